"""The log: lines to read, lines to compute with, and a folder that is never written over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helixpipe.config import Config
from helixpipe.config_text import read_toml, to_table
from helixpipe.errors import HelixpipeError
from helixpipe.parts.part import chain
from helixpipe.parts.work import Batch
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.predict.timeline_text import load
from helixpipe.schedule.action import Action
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.train.job import Job
from helixpipe.train.log import Log
from helixpipe.train.record import Metrics, Ranks, StepRecord

TIMELINE = Timeline(
    ((Span(Action.parse("0F0"), 0.0, 1.0),), (Span(Action.parse("1F0"), 1.0, 2.0),)),
    ((MemoryPoint(0.0, 3 << 20),), (MemoryPoint(1.0, 5 << 20),)),
)
SHAPE = Config().shape()
PARTS = chain(SHAPE.layers)
SCHEDULE = Schedule((Stage(PARTS[:4]), Stage(PARTS[4:])), ((Action.parse("0F0"),), (Action.parse("1F0"),)))
PROGRAM = lower(SCHEDULE, SHAPE, Batch(1, (2,)))
RECORD = StepRecord(1, 2.5, 0.75, 1e-3, 2.0, TIMELINE.totals)


def job(folder: Path, checkpoint: Path | None = None, step: int = 0) -> Job:
    run = dataclasses.replace(Config().run, folder=str(folder))
    return Job(dataclasses.replace(Config(), run=run), checkpoint, step)


def test_a_step_is_a_line_to_read_and_a_line_to_compute_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(job(tmp_path / "run"), 0, "cpu") as log:
        log.evaluation(0, 5.5, [5.75, 5.5, 5.25])
        log.step(RECORD)
        log.evaluation(120, 2.25)
        log.draw(TIMELINE, PROGRAM, 1)
    shown = capsys.readouterr()
    assert shown.err.splitlines()[2:] == [
        "step 0/120  held-out loss 5.5000",
        "step 1/120  loss 2.5000  grad norm 0.750  2,048 tokens/s  bubble 50.0%  peak activations 5.0 MiB  "
        "1,024 tokens/s per accelerator",
        "step 120/120  held-out loss 2.2500",
    ]
    assert shown.out == (
        f"trained to step 120 in 0:00; held-out loss 2.2500 nats a token, from 5.5000; run folder {tmp_path / 'run'}\n"
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[::2] == [
        {"step": 0, "held_out_loss": 5.5, "held_out_loss_by_position": [5.75, 5.5, 5.25]},
        {"step": 120, "held_out_loss": 2.25},
    ]
    assert lines[1] == Metrics.of(RECORD, Config(), None).numbers()
    assert read_toml(tmp_path / "run" / "config.toml") == to_table(job(tmp_path / "run").config)
    assert "helix, 2 ranks, 4 micro-batches: step 1, measured" in (tmp_path / "run" / "timeline.svg").read_text()
    assert load(tmp_path / "run" / "timeline.json") == TIMELINE
    assert "this step&#x27;s own action times" in (tmp_path / "run" / "timeline.html").read_text()
    assert json.loads((tmp_path / "run" / "timeline.perfetto.json").read_text())["traceEvents"]


def test_a_rank_that_becomes_slow_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = Ranks(3, 1.8, "rank 3 (pp 1, dp 1)"), Ranks(0, 1.1, "rank 0 (pp 0, dp 0)")
    with Log(job(tmp_path), 0, "cpu") as log:
        for step, ranks in enumerate((fast, slow, slow, fast, slow), start=1):
            log.step(RECORD._replace(step=step, ranks=ranks))
    said = [line for line in capsys.readouterr().err.splitlines() if "median" in line]
    named = "helixpipe: rank 3 (pp 1, dp 1)'s actions took 1.8 times their own median over the last 20 steps"
    assert said == [named, named]  # it had been as fast as before in between


def test_a_resumed_run_drops_the_lines_that_come_again(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 8, "lo')
    with Log(job(tmp_path, tmp_path / "checkpoints" / "step-00000004", 4), 0, "cpu"):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:4])


def test_a_run_that_begins_again_has_its_first_evaluation_once(tmp_path: Path) -> None:
    """It was killed before its first checkpoint: what it wrote of step 0 comes again too."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "held_out_loss": 5.5}\n{"step": 1, "loss": 5.4}\n')
    with Log(job(tmp_path), 0, "cpu") as log:
        log.evaluation(0, 5.5)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0]


def test_later_checkpoints_are_set_aside_when_a_run_goes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with Log(job(tmp_path, tmp_path / "checkpoints" / "step-00000004", 4), 0, "cpu"):
        left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [".left-step-00000008", "step-00000004"]
    said = "later checkpoints are set aside until the next one removes them: step-00000008\n"
    assert said in capsys.readouterr().err


def test_other_ranks_say_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(job(tmp_path / "run"), 1, "cpu") as log:
        log.evaluation(0, 5.5)
        log.step(RECORD)
        log.draw(TIMELINE, PROGRAM, 1)
        log.flush()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HelixpipeError) as caught, Log(job(tmp_path / "file" / "run"), 0, "cpu"):
        pass
    assert str(caught.value) == f"run.folder: '{tmp_path / 'file' / 'run'}' cannot be made: not a directory"
