"""Sinks with the libraries themselves, where they are installed: `pip install 'helixpipe[logging]'`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import dataclasses, pathlib, sys
from helixpipe.config import Config
from helixpipe.predict.timeline import Timeline
from helixpipe.train.job import Job
from helixpipe.train.log import Log
from helixpipe.train.record import StepRecord

name, folder, begun = sys.argv[1:]
run = dataclasses.replace(Config().run, folder=folder, log=(name,))
job = Job(dataclasses.replace(Config(), run=run), None, int(begun))
with Log(job, 0, "cpu") as log:
    for step in range(job.step + 1, job.step + 4):
        log.step(StepRecord(step, 10.0 * job.step + step, 0.75, 1e-3, 2.0, Timeline(((),), ((),))))
"""


def run(name: str, folder: Path, begun: int) -> list[str]:
    """Three steps from one on, by a process of their own; what it said of the sink."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, folder, str(begun)],
        env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if name in line and not line.startswith("run folder")]


def test_tensorboard_shows_each_step_once_and_as_it_was_last(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    said = [run("tensorboard", tmp_path, begun) for begun in (0, 1)]
    assert said == [[f"helixpipe: run.log: tensorboard writes to {tmp_path / 'tensorboard'}"]] * 2
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1), (2, 12), (3, 13), (4, 14)]


def test_wandb_writes_offline_and_knows_its_run_again(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    said = [run("wandb", tmp_path, begun) for begun in (0, 1)]
    assert said == [[f"helixpipe: run.log: wandb writes to {tmp_path / 'wandb'}"]] * 2
    kept = json.loads((tmp_path / "wandb.json").read_text())
    assert kept["step"] == 4
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")} == {kept["id"]}
