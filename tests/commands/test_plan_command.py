"""`helixpipe plan`: the table, the list, the picture and the config that trains."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from helixpipe.cli import main
from helixpipe.config import Config
from helixpipe.config_text import build_config, read_toml
from helixpipe.parts.shapes import SHAPES
from helixpipe.predict.choices import estimate_candidate
from helixpipe.predict.estimate import Setting
from helixpipe.predict.plan import plan
from helixpipe.schedule.families import FAMILIES

TINY = "--ranks 4 --microbatches 4 --model tiny --sequence-length 1024 --processes 1"
SMALL = "--ranks 2 --microbatches 4 --model tiny --sequence-length 1024 --hardware laptop-core --processes 1"


def written(path: Path) -> Config:
    """The config that a plan wrote, as it is once what no plan knows is given."""
    table = read_toml(path)
    assert table["run"].pop("asks") == ["data.path", "train.steps", "train.learning_rate"]
    return build_config(table)


def test_json_is_a_ranked_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"plan {SMALL} --families 1f1b,helix --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    times = [each["makespan_s"] for each in found]
    assert times == sorted(times)
    assert {each["family"] for each in found} == {"1f1b", "helix", "fsdp", "context_parallel"}
    for each in found:
        assert {"options", "ideal_s", "bubble_ratio", "recompute", "ranks"} <= each.keys()
        assert {"busy_s", "idle_s", "peak_activation_bytes", "peak_bytes"} <= each["ranks"][0].keys()


def test_the_table_has_the_best_the_front_and_what_is_no_pipeline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(f"plan {SMALL} --families 1f1b,seq1f1b --top 3".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "tiny, 4 micro-batches of 1 x 1,024 tokens on 2 ranks; laptop-core, 7.4 GiB each, link loopback"
    )
    assert re.match(
        r"the fastest 3 that fit; \d+ more are slower or do not fit, most of them by a bound alone; ", lines[1]
    )
    rows = [line for line in lines[3:] if line[:3].strip().isdigit()]
    assert [int(line[:3]) for line in rows] == [1, 2, 3]  # as many as are asked for
    assert rows[0][3] == "*"
    assert sum(line.startswith("not a pipeline: ") for line in lines) == 2


def test_the_table_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on in another line stands under the schedule that it is of."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(f"plan {SMALL} --families seq1f1b_interleaved --top 4".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    at = next(i for i, line in enumerate(lines) if line.startswith("  1*"))
    assert re.match(r" {45}\S", lines[at + 1])
    monkeypatch.setenv("COLUMNS", "160")
    assert main(f"plan {SMALL} --families seq1f1b_interleaved --top 4".split()) == 0
    wide = capsys.readouterr().out.splitlines()
    assert max(map(len, wide)) <= 160
    assert len(wide) < len(lines)


def test_what_is_no_pipeline_says_that_it_runs_in_chunks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    given = SMALL.replace("--sequence-length 1024", "--sequence-length 8192")
    assert main(f"plan {given} --families 1f1b --memory 0.12".split()) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not a pipeline: fsdp ")]
    assert len(told) == 1
    assert " MiB, recompute selective, chunks of 4096: " in told[0]


def test_the_config_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "planned.toml"
    assert (
        main(f"plan {SMALL} --families seq1f1b_interleaved --config {config} --svg {tmp_path / 'a.svg'}".split()) == 0
    )
    read = written(config)
    assert read.schedule.family == "seq1f1b_interleaved"
    assert read.train.sequence_length == 1024
    assert read.runtime.dtype == "float32"
    assert "tiny at 1,024 tokens" in (tmp_path / "a.svg").read_text()
    (tmp_path / "text.txt").write_text("what a plan does not know " * 2000)
    flags = f"--data.path {tmp_path / 'text.txt'} --train.learning_rate 1e-3 --train.steps 2 --train.evaluate_every 0 --data.held_out 0 --run.timeline_step 2 --run.checkpoint_every 0"
    assert main(["train", str(config), "--run.folder", str(tmp_path / "run"), *flags.split()]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    numbers = {(row["name"], row["rank"]): row for row in told["numbers"]}
    assert numbers["makespan_s", None]["measured"] > 0
    for rank in range(2):  # the formula and the ledger
        # which messages are under way at the fullest moment is the clocks'
        assert numbers["peak_activation_bytes", rank]["ratio"] == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SMALL} --memory 0.001 --families 1f1b", "--memory: no schedule fits 0.0 GiB; the nearest is 1f1b, recompute full"),
        (f"{SMALL} --memory -3", "--memory: -3 GiB; give more than 0"),
        (f"{SMALL} --families 1f2b", "error: --families: '1f2b' is not known; did you mean '1f1b'?"),
        (f"{SMALL} --ranks 0", "ranks, microbatches: 0, 4; give at least 1 of each"),
        (f"{SMALL} --processes -1", "--processes: -1; give at least 1, or 0 for one a core"),
        (f"{SMALL} --mlp-chunk 512", "'--mlp-chunk' is not an option of helixpipe plan"),
        (f"{SMALL} --ranks 64 --families 1f1b", "error: no schedule can be made for this: schedule.ranks: 4 layers cannot fill 64"),
        (f"{SMALL} --microbatches 99999999", "up to 399,999,996 actions are more than fit here (2,000,000); ask for fewer"),
        (f"{SMALL} --ranks 99999999", "up to 799,999,992 actions are more than fit here (2,000,000); ask for fewer"),
        (f"{SMALL} --hardware h101", "--hardware: 'h101' is not known; did you mean 'h100'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *line.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err


def test_an_alternative_is_the_answer_where_no_pipeline_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    line = f"{TINY} --families gpipe"
    assert main(["plan", *line.split(), "--json"]) == 0
    least = {True: math.inf, False: math.inf}
    for each in json.loads(capsys.readouterr().out):
        peak = max(rank["peak_bytes"] for rank in each["ranks"])
        least[each["is_pipeline"]] = min(peak, least[each["is_pipeline"]])
    line += f" --memory {(least[True] + least[False]) / 2**31}"
    assert main(["plan", *line.split(), "--svg", str(tmp_path / "a.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("memory: no schedule fits 0.0 GiB; the nearest is gpipe, recompute ")
    assert any(line.startswith("not a pipeline: ") and line.endswith(": fits where no pipeline does") for line in lines)
    assert "does not fit" in (tmp_path / "a.svg").read_text()
    assert main(["plan", *line.split(), "--json"]) == 0
    assert not any(each["is_pipeline"] for each in json.loads(capsys.readouterr().out))
    assert main(["plan", *line.split(), "--config", str(tmp_path / "a.toml")]) == 2
    shown = capsys.readouterr()
    assert "fits where no pipeline does" in shown.out
    assert shown.err.startswith("helixpipe: error: --memory: no schedule fits")
    assert not (tmp_path / "a.toml").exists()


def test_what_was_refused_is_counted_with_its_commonest_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(f"plan {TINY} --families 1f1b,seq1f1b --cp 2 --segment-multiple 1".split()) == 0
    told = capsys.readouterr().out.splitlines()[2]
    assert re.fullmatch(r"refused: \d+; the commonest reason, \d+ times: schedule.segment_multiple: .*", told)


def test_what_no_candidate_can_have_is_refused_before_the_search(
    profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("helixpipe.predict.plan._runner", lambda processes: pytest.fail("it searched"))
    assert main(f"plan {TINY} --profile {profile} --tp 2".split()) == 2
    assert (
        "--profile: measured with tp 1, cp 1 where tp 2, cp 1 is asked for; measure this one: "
        in capsys.readouterr().err
    )
    assert main(f"plan {TINY} --model gpt2 --sequence-length 4096".split()) == 2
    assert "learned positions have room for 1024" in capsys.readouterr().err


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_config_builds_the_very_schedule_that_was_priced(family: str, tmp_path: Path) -> None:
    """For a model so small that a pass takes less than a millisecond."""
    path = tmp_path / "a.toml"
    line = f"--ranks 2 --microbatches 4 --model tiny --sequence-length 1024 --processes 1 --families {family}"
    assert main(["plan", *line.split(), "--config", str(path)]) == 0
    config = written(path)
    schedule = config.build_schedule()
    found = plan(Setting(SHAPES["tiny"], 1024), 2, 4, math.inf, (family,))
    assert not [reason for reason in found.refused.values() if "costs" in reason]
    priced = estimate_candidate(Setting(SHAPES["tiny"], 1024), 2, 4, found.best.candidate)
    assert schedule == priced.schedule
    assert config.setting().batch(schedule.segments) == priced.program.batches[0]
