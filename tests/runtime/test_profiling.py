"""Measuring the parts: what is timed, and what comes of it. No test here depends on how fast a machine is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks

from helixpipe.commands.profile import _parser, _words, profile
from helixpipe.commands.shape_flags import shape_from
from helixpipe.errors import ConfigError, HelixpipeError, RankError
from helixpipe.parts.part import Part, chain
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch
from helixpipe.predict.hardware import Link
from helixpipe.predict.profile import PROFILED, SIZES, WITH_WEIGHTS, Profile, Timing
from helixpipe.runtime.profiling import Asked, Parts, default_cuts, measure, measure_link, measure_machine
from helixpipe.schedule.action import Pass
from helixpipe.schedule.check import check

TINY = ModelShape(layers=3, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19, tied=True)
CUTS = ((16,), (32,), (16, 16), (8, 16, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pass_of_every_part_is_timed_at_every_length_and_context(dtype: torch.dtype) -> None:
    found = measure(TINY, "cpu", dtype, CUTS, rounds=2)
    places = {(16, 0), (32, 0), (16, 16), (8, 0), (16, 8), (8, 24)}
    for kind in PROFILED:
        for run in (Pass.F, Pass.I, *([Pass.W] if kind in WITH_WEIGHTS else [])):
            timed = [(t.length, t.context) for t in found.timings if t[:2] == (kind, run)]
            assert sorted(timed) == sorted(places)
    assert all(timing.seconds > 0 for timing in found.timings)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert (found.shape, found.threads, found.ranks, found.link) == (TINY, torch.get_num_threads(), 1, None)
    assert Profile.from_json(found.to_json()) == found


def test_what_is_measured_prices_more_work_dearer_and_never_below_zero() -> None:
    found = measure(TINY, "cpu", torch.float32, CUTS, rounds=1)
    sizes = [Batch(1, (length,)) for length in (8, 64, 512, 4096)]
    for part in chain(TINY.layers):
        for price in (found.forward_s, found.input_s, found.weight_s):
            seconds = [price(part, batch, 0) for batch in sizes]
            assert seconds == sorted(seconds)
            assert min(seconds) >= 0
    behind = [found.forward_s(Part("attn", 0), Batch(1, (context, 16)), 1) for context in (16, 64, 4096)]
    assert behind == sorted(behind)
    assert found.weight_s(Part("attn", 0), sizes[0], 0) == 0
    assert math.isfinite(found.worst_error)


def test_a_norm_behind_the_table_is_timed_as_the_layer_s() -> None:
    """Layer 0 has none then, and stands for all layers where parts are timed: the price of one for each layer is right."""
    shape = replace(TINY, embed_norm=True)
    parts = Parts(shape, "cpu", torch.float32)
    modules = parts.weights.modules
    assert [name for name, _ in modules[Part("norm", 0)].named_parameters()] == ["weight"]
    assert [name for name, _ in modules[Part("embed", 0)].named_parameters()] == ["tokens.weight"]
    assert parts.profile([*parts.run((16,)), *parts.run((32,))]).shape == shape


def test_the_parts_are_run_as_a_schedule_that_can_be() -> None:
    """The steps that are timed leave nothing behind, and make every gradient."""
    parts = Parts(TINY, "cpu", torch.float32)
    check(parts._schedule(3))
    list(parts.run((8, 16, 8)))
    assert parts.ledger.bytes == 0
    assert all(master.grad is not None and master.grad.abs().sum() > 0 for master in parts.weights.masters.values())


def test_sequences_measured() -> None:
    assert default_cuts(TINY, 256) == ((32,), (64,), (128,), (256,), (128, 128), (64,) * 4, (32,) * 8)
    assert default_cuts(replace(TINY, causal=False), 256) == ((32,), (64,), (128,), (256,))
    assert default_cuts(TINY, 40) == ((16,), (20,), (40,), (20, 20))


def test_a_model_that_sees_both_ways_is_measured_whole() -> None:
    shape = replace(TINY, causal=False)
    found = measure(shape, "cpu", torch.float32, default_cuts(shape, 64), rounds=1)
    assert {timing.context for timing in found.timings} == {0}


def link() -> Link | None:
    """Ranks 2 and 3 only hear of it."""
    return measure_link("cpu")


def test_the_link_is_the_same_on_all_ranks(four_ranks: Ranks) -> None:
    found = four_ranks.run(link)
    assert found[0].bytes_per_s > 0 <= found[0].latency_s
    assert 0 <= found[0].host_s_per_byte < 1e-6
    assert found[0].source == "ping-pong between two ranks of this machine over gloo"
    assert found == [found[0]] * 4


def test_ranks_measure_at_once_and_leave_no_process() -> None:
    before = set(active_children())
    asked = Asked(TINY, "cpu", "float32", ((16,), (32,)), 1, 1)
    found = measure_machine(asked, 2)
    assert found.ranks == 2
    assert found.link is not None
    assert len([t for t in found.timings if t[:4] == ("mlp", Pass.F, 32, 0)]) == 2
    assert set(active_children()) <= before
    assert not dist.is_initialized()


def test_a_rank_that_fails_is_told_and_leaves_no_process() -> None:
    before = set(active_children())
    with pytest.raises(RankError) as error:
        measure_machine(Asked(TINY, "cpu", "nonsense", ((16,), (32,)), 1, 1), 2)
    assert re.fullmatch(
        r"rank [01] of the measurement ended: AttributeError: module 'torch' has no attribute 'nonsense'",
        str(error.value),
    )
    assert set(active_children()) <= before


def _no_device_memory() -> None:
    raise torch.OutOfMemoryError("no")


@pytest.mark.parametrize("ask", [_no_device_memory, lambda: torch.empty(2**60, dtype=torch.uint8)])
def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object]) -> None:
    def run(parts: Parts, cut: Any) -> Any:
        ask()

    monkeypatch.setattr(Parts, "run", run)
    with pytest.raises(HelixpipeError) as error:
        measure_machine(Asked(TINY, "cpu", "float32", ((16,), (1024, 1024)), 1, torch.get_num_threads()), 1)
    assert str(error.value) == (
        "out of memory at 2,048 tokens on cpu: lower --sequence-length; longer ones are extrapolated"
    )


def test_the_command_prints_one_object_and_writes_the_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "profile.json")
    sizes = "--hidden 16 --heads 2 --ffn 16 --vocabulary 19 --sequence-length 64 --rounds 1 --ranks 1 --device cpu"
    threads = torch.get_num_threads()
    assert profile([*sizes.split(), "--out", out, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["file"] == out
    assert {(fit["part"], fit["pass"]) for fit in found["fits"]} == set(Profile.load(out).curves)
    assert "measuring: round 3 of 3" in printed.err
    assert profile([*sizes.split(), "--out", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["part", "pass"]
    assert [line.split()[:2] for line in lines if line.startswith("attn")] == [["attn", "forward"], ["attn", "input"]]
    assert lines[-2] == "link: not measured, with one device; name one where a prediction asks for it"
    assert lines[-1] == f"written: {out}"
    torch.set_num_threads(threads)


def test_timings_that_scatter_are_told() -> None:
    even = Timing("mlp", Pass.F, 64, 0, 1e-3)
    told = "timings are up to 60% off their curves: other work on this machine, or parts too small to time; measure when it is idle, with more --rounds or a longer --sequence-length"
    for slowest, expected in ((1.0, False), (3.0, True)):
        timings = [Timing(kind, run, n, 0, 1e-6 * n) for kind in PROFILED for run in "FIW" for n in (64, 128)]
        timings += [even._replace(seconds=64e-6 * slowest)]
        found = replace(measure_once(), timings=tuple(t._replace(run=Pass(t.run)) for t in timings))
        assert any(told == line for line in _words(found)) is expected


REFUSED = [
    ("--model tyny", "--model: 'tyny' is not known; did you mean 'tiny'?"),
    ("--heads 3", "--heads: 3 heads do not divide hidden size 128; choose a divisor or set model.head_dim"),
    ("--causal yes", "--causal: 'yes' is neither true nor false"),
    ("--dtype float8", "--dtype: 'float8' is not known; known: float32, bfloat16, float64"),
    ("--device tpu", "--device: 'tpu' is not known; known: auto, cpu, cuda"),
    ("--rounds 0", "--rounds: 0; give at least 1"),
    ("--ranks 65", "--ranks: 65 processes at once are more than 64; two tell as much"),
    ("--sequence-length 31", "--sequence-length: 31 tokens tell nothing; give at least 32"),
    (
        "--model gpt2",
        "--sequence-length: 2048 tokens, and learned positions have room for 1024; shorten it or raise --context",
    ),
    ("--out /", "--out: / is a folder or in none; name a file in a folder that is there"),
    (
        "--out none/profile.json",
        "--out: none/profile.json is a folder or in none; name a file in a folder that is there",
    ),
    (f"--out {'x' * 300}", f"--out: {'x' * 300} cannot be written: file name too long"),
    ("--layers 3", "'--layers' is not an option of helixpipe profile; did you mean '--bias'?"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_the_command_refuses(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        profile(given.split())
    assert str(error.value) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device() -> None:
    with pytest.raises(ConfigError) as error:
        profile(["--device", "cuda"])
    assert str(error.value) == "--device: 'cuda', and torch sees none here; use 'auto' or 'cpu'"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([name for name in sorted(SHAPES) if not SHAPES[name].window_pattern]), st.data())
def test_the_command_that_a_profile_tells_measures_its_shape(name: str, data: Any) -> None:
    heads = data.draw(st.sampled_from((4, 8)))
    changes: dict[str, Any] = {
        "hidden": data.draw(st.sampled_from((128, 4096))),
        "heads": heads,
        "kv_heads": data.draw(st.sampled_from((2, 4, heads))),
        "head_dim": data.draw(st.sampled_from((0, 32))),
        "positions": data.draw(st.sampled_from(("rope", "learned"))),
        "context": 4096,
        "mlp": data.draw(st.sampled_from(("gelu", "swiglu", "geglu_tanh"))),
        "norms": data.draw(st.sampled_from(("before", "after", "both"))),
        "o_bias": data.draw(st.booleans()),
        "head_transform": data.draw(st.booleans()),
        **data.draw(st.sampled_from(({}, {"qk_norm": True}, {"qk_norm": True, "qk_norm_over": "width"}))),
        "causal": data.draw(st.booleans()),
    }
    if changes["positions"] == "learned":  # which are not scaled
        changes["rope"] = Rotary()
    shape = replace(SHAPES[name], **changes)
    timings = measure_once().timings
    told = Profile(shape, "x", "float32", 1, 1, "2", timings).command()
    args = _parser().read(told.split()[2:])
    made = shape_from(args)
    assert {key: getattr(made, key) for key in SIZES} == {key: getattr(shape, key) for key in SIZES}
    assert args.sequence_length == 32


_ONCE: list[Profile] = []


def measure_once() -> Profile:
    if not _ONCE:
        _ONCE.append(measure(TINY, "cpu", torch.float32, ((16,), (32,)), rounds=1))
    return _ONCE[0]
