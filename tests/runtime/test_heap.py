"""What a timeline counts is what the allocator holds: heap bytes of all threads, metered from outside, beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heap
import pytest
from memory.measure import Case, Peak, peaks

from helixpipe.parts.lora import Lora

WITHIN = 0.10  # of what a timeline says
CHUNK = 256
SIZES: dict[str, Any] = {"layers": 4, "hidden": 128, "length": 2048, "microbatches": 2}
SHORT = SIZES | {"length": 1024}  # half as long, for a third of the time
SEGMENTS = {"segments": 4, "stages_per_rank": 2}

CASES = [
    Case("1f1b", **SHORT),
    Case("1f1b", "full", CHUNK, **SIZES),
    Case("1f1b", "selective", CHUNK, **SHORT),
    Case("zb_v", **SHORT),
    Case("zb_h2", "full", CHUNK, **SHORT),
    Case("seq1f1b_interleaved", "selective", CHUNK, SEGMENTS, **SHORT),
    Case("helix", "selective", CHUNK, {"travel": "none"}, **SHORT),
    Case("helix", "selective", CHUNK, {"travel": "attention"}, **SHORT),
]
SPREAD = {"options": {"vocabulary": "spread"}, "model": {"vocabulary": 4096}}
CASES += [Case("1f1b", "selective", **SPREAD, **SHORT), Case("zb_h1", "none", **SPREAD, **SHORT)]
WINDOWS = [
    Case("1f1b", "full", CHUNK, model={"window": 256}, **SHORT),
    Case("1f1b", model={"window": 200, "window_pattern": (True, False)}, **SHORT),
    Case("seq1f1b_interleaved", "selective", CHUNK, SEGMENTS, model={"window": 300}, **SHORT),
    Case("1f1b", "selective", CHUNK, model={"softcap": 20.0}, **SHORT),
]
ALONE = [Case("1f1b", "full", CHUNK, ranks=1, **SHORT)]
GEMMA = {
    "norm": "rms",
    "norms": "both",
    "norm_offset": True,
    "mlp": "geglu_tanh",
    "head_softcap": 5.0,
    "embed_scale": 11.3,
}
OLMO = {"norm": "rms", "norms": "after", "mlp": "swiglu", "qk_norm": True, "qk_norm_over": "width"}
BERT = {"norm_bias": False, "embed_norm": True, "mlp": "geglu", "head_transform": True, "vocabulary": 1024}
SMALL: dict[str, Any] = {"ranks": 1, "layers": 2, "hidden": 128, "length": 1024, "microbatches": 2}
ALONE += [Case("1f1b", "none", model=GEMMA, **SMALL), Case("1f1b", "full", CHUNK, model=OLMO, **SMALL)]
ALONE += [Case("1f1b", "selective", model=BERT, **SMALL)]
LORA = {"norm": "rms", "mlp": "swiglu", "lora": Lora(16, targets=("q", "v", "up", "down"))}
ALONE += [Case("1f1b", "none", model=LORA, **SMALL)]
DEPTHS = [Case("1f1b", chunk=CHUNK, ranks=1, evaluates=True, **(SHORT | {"layers": layers})) for layers in (2, 6)]


@pytest.fixture(scope="module")
def meter() -> None:
    if why := heap.why_not():
        pytest.skip(why)


@pytest.fixture(scope="module")
def found(meter: None) -> dict[str, list[Peak]]:
    """Of each case, each rank's peak."""
    cases = [[*CASES, *WINDOWS], [*ALONE, *DEPTHS]]
    return {str(case): peak for some in cases for case, peak in zip(some, peaks(some, 120), strict=True)}


@pytest.mark.parametrize("case", [*CASES, *WINDOWS, *ALONE], ids=str)
def test_the_heap_holds_what_the_timeline_counts(found: dict[str, list[Peak]], case: Case) -> None:
    ratios = [peak.heap_over_timeline for peak in found[str(case)]]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=WITHIN), told(found[str(case)])


@pytest.mark.parametrize("case", [*CASES, *WINDOWS, *ALONE], ids=str)
def test_the_heap_holds_what_was_predicted(found: dict[str, list[Peak]], case: Case) -> None:
    ratios = [peak.predicted_over_heap for peak in found[str(case)]]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=WITHIN), told(found[str(case)])


def test_a_recompute_holds_no_n_and_few_gradients_beside_q_k_and_v(found: dict[str, list[Peak]]) -> None:
    """In attention's backward: 2 inputs of layers, q k v o, the gradients of o and of the residual, a head's of four, a
    posted receive, each of b*s*h; and the kernel's tiles, 1 MiB."""
    case = Case("1f1b", "full", CHUNK, **SIZES)
    unit = case.length * case.hidden * 4
    for peak in found[str(case)]:
        assert peak.heap_bytes <= 1.02 * ((2 + 4 + 2 + 1 + 1) * unit + 2**20), told(found[str(case)])


def test_an_evaluation_holds_no_more_for_more_layers(found: dict[str, list[Peak]]) -> None:
    (few,), (many,) = (found[str(case)] for case in DEPTHS)
    assert many.heap_bytes == pytest.approx(few.heap_bytes, rel=WITHIN)


def told(peaks: list[Peak]) -> str:
    return "; ".join(
        f"rank {rank}: heap {peak.heap_bytes:,}, timeline {peak.timeline_bytes or 0:,}, "
        f"predicted {peak.predicted_bytes or 0:,}"
        for rank, peak in enumerate(peaks)
    )


# The meter itself

BLOCK = 2**22
METERED = f"""
import ctypes, heap, threading

def call(name, *numbers):
    function = getattr(ctypes.CDLL(None), name)
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * len(numbers)
    return function(*numbers)

def aligned():
    out = ctypes.c_void_p()
    assert not call("posix_memalign", ctypes.addressof(out), 64, {BLOCK})
    return out.value

def metered(name, *numbers):
    before = heap.now_bytes()
    block = call(name, *numbers) if numbers else aligned()
    during = heap.now_bytes() - before
    call("free", block)
    return during, heap.now_bytes() - before

ways = [("malloc", {BLOCK}), ("calloc", 4, {BLOCK} // 4), ("realloc", 0, {BLOCK}), ("realloc", call("malloc", 100), {BLOCK}),
        ("reallocarray", 0, 4, {BLOCK} // 4), ("memalign", 64, {BLOCK}), ("aligned_alloc", 64, {BLOCK}),
        ("valloc", {BLOCK}), ("pvalloc", {BLOCK}), ("posix_memalign",)]
for way in ways:
    print(*metered(*way))

def in_a_thread():
    thread = threading.Thread(target=metered, args=ways[0])
    thread.start()
    thread.join()

in_a_thread()
print(heap.over_before(in_a_thread), heap.peak_bytes() - heap.now_bytes())
"""
SLACK = 2**16


def in_a_metered_process(code: str) -> list[list[int]]:
    with heap.metered():
        path = f"import sys; sys.path.insert(0, {str(heap.SOURCE.parent)!r})\n"
        done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


def test_every_way_to_ask_for_memory_is_metered_and_every_thread(meter: None) -> None:
    *ways, (peak, above) = in_a_metered_process(METERED)
    assert len(ways) == 10
    for during, after in ways:
        assert BLOCK <= during < BLOCK + SLACK
        assert abs(after) < SLACK
    assert BLOCK <= peak < BLOCK + SLACK  # freed in the thread again, and seen all the same
    assert above > BLOCK - SLACK


def test_the_meter_is_in_processes_started_within_and_in_no_others(meter: None) -> None:
    code = "import os; print(os.environ.get('LD_PRELOAD', '').count('helixpipe-heapmeter'))"
    assert in_a_metered_process(code) == [[1]]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "0"


def test_a_process_without_the_meter_says_so() -> None:
    with pytest.raises(heap.NoMeter, match=r"no heap meter in this process: start it within heap.metered\(\)"):
        heap.now_bytes()


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As if nothing were compiled yet, in an empty temporary folder."""
    monkeypatch.setattr(heap.tempfile, "gettempdir", lambda: str(tmp_path))
    heap.library.cache_clear()
    yield tmp_path
    heap.library.cache_clear()


def test_no_linux_no_meter(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap.why_not() == "no heap meter on darwin: it is preloaded before glibc's allocator, which Linux has"


def test_no_compiler_no_meter(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.shutil, "which", lambda name: None)
    if sys.platform.startswith("linux"):
        assert heap.why_not() == "no heap meter without a C compiler: install one as cc, gcc or clang"


def test_a_c_library_without_the_names_that_it_needs_is_one_line(
    afresh: Path, meter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = afresh / "heapmeter.c"
    source.write_text(heap.SOURCE.read_text().replace("__libc_memalign", "__no_such_memalign"))
    monkeypatch.setattr(heap, "SOURCE", source)
    heap.library.cache_clear()
    assert heap.why_not().startswith("no heap meter: ")
    assert "does not compile heapmeter.c for this C library: " in heap.why_not()
    assert "__no_such_memalign" in heap.why_not()
    assert "\n" not in heap.why_not()


def test_another_s_folder_is_not_trusted(afresh: Path, meter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.os, "getuid", lambda: 12345)
    assert heap.why_not().endswith("helixpipe-heapmeter-12345 is another user's; set TMPDIR to a folder of your own")


def test_it_is_compiled_once(afresh: Path, meter: None) -> None:
    first = heap.library()
    made = first.stat().st_mtime_ns
    heap.library.cache_clear()
    assert heap.library() == first
    assert first.stat().st_mtime_ns == made
    assert [file.name for file in first.parent.iterdir()] == [first.name]
