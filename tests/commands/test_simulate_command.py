"""`helixpipe simulate`: what it prints, and every way it can be asked wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helixpipe.cli import main

LONG = "--ranks 8 --microbatches 16 --model 7b --sequence-length 131072"
SMALL = "--ranks 2 --microbatches 4 --model tiny --sequence-length 1024"


def asked(capsys: pytest.CaptureFixture[str], line: str) -> dict:
    assert main(["simulate", *line.split(), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_json_has_the_step_and_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, f"helix {LONG} --hardware ideal --recompute none --folds 2 --travel attention")
    assert found["family"] == "helix"
    assert found["options"] == {"folds": 2, "travel": "attention"}
    assert 1 < found["makespan_s"] / found["ideal_s"] < 1.2
    assert 0 < found["bubble_ratio"] < 0.2
    assert [rank["rank"] for rank in found["ranks"]] == list(range(8))
    for rank in found["ranks"]:
        assert rank["busy_s"] + rank["idle_s"] == pytest.approx(found["makespan_s"])
        assert sum(rank["idle_by_reason_s"].values()) == pytest.approx(rank["idle_s"], abs=1e-6 * found["makespan_s"])
        assert 0 < rank["peak_activation_bytes"] < rank["peak_bytes"]


def test_hardware_link_and_policy_change_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    h20 = asked(capsys, f"1f1b {LONG} --hardware h20 --recompute none")
    h200 = asked(capsys, f"1f1b {LONG} --hardware h200 --recompute none")
    full = asked(capsys, f"1f1b {LONG} --hardware h200 --recompute full")
    assert h20["makespan_s"] > 3.5 * h200["makespan_s"]
    assert full["makespan_s"] > 1.2 * h200["makespan_s"]
    assert full["ranks"][0]["peak_activation_bytes"] < h200["ranks"][0]["peak_activation_bytes"] / 5
    wired = asked(capsys, f"helix {LONG} --hardware h200 --link ethernet")
    assert wired["makespan_s"] > asked(capsys, f"helix {LONG} --hardware h200")["makespan_s"]


def test_the_tensor_link_is_the_accelerators_own(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"1f1b {LONG} --hardware a100 --tp 8"
    own = asked(capsys, line)["makespan_s"]
    assert own == asked(capsys, f"{line} --tensor-link nvlink-a100")["makespan_s"]
    assert own > asked(capsys, f"{line} --tensor-link nvlink")["makespan_s"]


def test_a_profile_is_named_as_what_prices_and_its_end_is_told(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, f"1f1b {SMALL} --profile {profile}")["hardware"] == "measured costs"
    line = "1f1b --ranks 2 --microbatches 4 --model tiny --sequence-length 8192"
    assert main(["simulate", *line.split(), "--profile", str(profile)]) == 0
    told = capsys.readouterr().err
    assert told.startswith(
        "profile: 8,192 tokens are 8 times the longest measured (1,024), and costs are extrapolated; "
    )


def test_the_page_has_the_step_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the sum of gradients that follows the last action."""
    page = tmp_path / "a.html"
    assert main(f"simulate 1f1b {SMALL} --dp 8 --hardware h100 --link ethernet --html {page}".split()) == 0
    step = capsys.readouterr().out.splitlines()[1].split(",")[0].removeprefix("step ")
    assert f">{step}<" in page.read_text()


def test_segments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, f"seq1f1b {SMALL} --segments 4 --evenness 1")
    assert found["segment_lengths"] == [256] * 4
    cut = asked(capsys, f"seq1f1b {SMALL} --segments 4 --segment-multiple 1")["segment_lengths"]
    assert sum(cut) == 1024
    assert cut == sorted(cut, reverse=True)


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"simulate 1f1b {LONG} --hardware h20 --tensor-parallel 8".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1f1b: 8 ranks, 16 micro-batches of 1 x 131,072 tokens; h20, link infiniband"
    assert lines[1].startswith("step ")
    assert " of ideal " in lines[1]
    assert lines[3].split() == [
        "rank",
        "busy",
        "idle",
        "warm-up",
        "drain",
        "imbalance",
        "message",
        "activations",
        "all",
        "bytes",
    ]
    assert [line.split()[0] for line in lines[4:12]] == [str(rank) for rank in range(8)]
    assert lines[-2].startswith("critical path: ")
    assert lines[-1] == "held back by the head, on rank 7: 58.69 s busy where the others have 55.12 s"


def test_waiting_for_shards_of_the_vocabulary_has_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"simulate 1f1b {SMALL} --vocabulary spread".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line.split() for line in lines if line.split()[:1] == ["rank"])
    assert head[3:8] == ["warm-up", "drain", "imbalance", "shards", "message"]


def test_many_ranks_are_shown_by_the_first_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["simulate", "1f1b", "--ranks", "32", "--microbatches", "8", "--model", "7b", "--sequence-length", "4096"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[5:22]] == [*map(str, range(8)), "...", *map(str, range(24, 32))]


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.svg", "a.html", "a.json")]
    flags = f"--svg {files[0]} --html {files[1]} --perfetto {files[2]}"
    assert main(f"simulate helix {SMALL} {flags}".split()) == 0
    assert "tiny at 1,024 tokens, predicted" in files[0].read_text()
    assert "tiny at 1,024 tokens, predicted" in files[1].read_text()
    assert json.loads(files[2].read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1f1b --ranks 2", "missing: --microbatches, --model, --sequence-length; write helixpipe simulate FAMILY --ranks P"),
        (f"1f2b {SMALL}", "FAMILY: '1f2b' is not known; did you mean '1f1b'?"),
        (f"1f1b {SMALL} --model 7c", "--model: '7c' is not known; did you mean '7b'?"),
        (f"1f1b {SMALL} --hardware h20o", "--hardware: 'h20o' is not known; did you mean 'h20'?"),
        (f"1f1b {SMALL} --link nvlnk", "--link: 'nvlnk' is not known; did you mean 'nvlink'?"),
        (f"1f1b {SMALL} --dtype fp8", "--dtype: 'fp8' is not known; known: bfloat16, float32, float64"),
        (f"1f1b {SMALL} --hardware h100 --dtype float64",
         "float64: h100 has no rate for it; measure with helixpipe profile --dtype float64, or use ideal"),
        (f"1f1b {SMALL} --optimizer adam", "--optimizer: 'adam' is not known; known: replicated, sharded"),
        (f"1f1b {SMALL} --recompute half", "--recompute: 'half' is not known; known: none, selective, full"),
        (f"1f1b {SMALL} --segments 2", "--segments: not an option of 1f1b, which has --opaque, --ends, but of terapipe"),
        (f"seq1f1b {SMALL} --segments 9000", "--segments: 9000 segments of a sequence of 1024 tokens; give at most 1024"),
        (f"seq1f1b {SMALL} --segments 2 --evenness 3", "--evenness: 3; give 0 (computation-wise) to 1 (even)"),
        (f"1f1b {SMALL} --evenness lots", "--evenness: 'lots' is not a number"),
        (f"1f1b {SMALL} --tensor-parallel 3", "--tp: 3 ranks do not divide model.heads 4; tp may be 1, 2 or 4"),
        (f"1f1b {SMALL} --mlp-chunk -1", "mlp_chunk, head_chunk: below 0; give tokens, or 0 for all at once"),
        (f"1f1b {SMALL} --sequence-length 0", "--sequence-length: 0; give at least 1"),
        (f"1f1b {SMALL} --ranks 0", "--ranks: 0; give at least 1"),
        (f"1f1b {SMALL} --microbatches 99999999", "up to 2,699,999,973 actions are more than fit here (2,000,000); ask for fewer"),
        (f"1f1b {SMALL} --tensor-link nvlnk", "error: --tensor-link: 'nvlnk' is not known; did you mean 'nvlink'?"),
        (f"1f1b {SMALL} --profile laptop", "error: --profile: laptop: cannot be read: no such file or directory"),
        (f"1f1b {SMALL} --profile model.json", "error: --profile: model.json: cannot be read: no such file or directory"),
        (f"1f1b {SMALL} --hardwar h20", "'--hardwar' is not an option of helixpipe simulate; did you mean '--hardware'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *line.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err
