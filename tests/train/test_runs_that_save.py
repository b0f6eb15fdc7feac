"""Runs whose checkpoints are due by the step and by the clock, and whose disk is full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_freezing import job
from test_saver import failing, names

from helixpipe.errors import CheckpointError
from helixpipe.train import checkpoint, loop, manifest
from helixpipe.train.stop import Stop

TINY = ("--train.evaluate_every", "0", "--train.evaluate_sequences", "1", "--train.steps", "3", "--run.keep", "9")


def trained(folder: Path, *more: str) -> list[float]:
    """Losses of a short run of one rank."""
    folder.mkdir(exist_ok=True)
    loop.train(job(folder, *TINY, *more, freeze=[]), "cpu", None, Stop())
    lines = (json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _seals(folder: Path) -> dict[str, Any]:
    """What stands for the tensors of each checkpoint."""
    found = {path.name: manifest.verify(path) for path in manifest.checkpoints(folder / "run" / "checkpoints")}
    return {name: made.files["__0_0.distcp"] for name, made in found.items()}


def test_checkpoints_by_the_clock_and_by_the_step(tmp_path: Path) -> None:
    clock = ("--run.checkpoint_every", "0", "--run.checkpoint_minutes", "1e-9")
    losses = [
        trained(tmp_path / "a", *clock),
        trained(tmp_path / "b", *clock, "--run.checkpoint_async", "false"),
        trained(tmp_path / "c", "--run.checkpoint_every", "0", "--run.checkpoint_minutes", "1000"),
    ]
    assert losses == [losses[0]] * 3
    assert list(_seals(tmp_path / "a")) == [f"step-{step:08d}" for step in (1, 2, 3)]
    assert _seals(tmp_path / "a") == _seals(tmp_path / "b")
    assert list(_seals(tmp_path / "c")) == ["step-00000003"]


def test_a_run_goes_on_where_its_disk_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, checkpoint.FileSystemWriter, "write_data")
    trained(tmp_path / "a", "--run.checkpoint_every", "1", "--run.checkpoint_async", "false")
    assert names(tmp_path / "a" / "run" / "checkpoints") == ["step-00000001", "step-00000003"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("helixpipe: ")]
    assert told == [
        "helixpipe: checkpoint of step 2: rank 0 could not write: no space left on device; training goes on, and the last good "
        "one is step-00000001"
    ]
    lines = [json.loads(line) for line in (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 2, "checkpoint_error": "rank 0 could not write: no space left on device"} in lines


class StopAt(Stop):
    """Asked to stop from the second time on that it is looked at."""

    looked = 0

    @property
    def asked(self) -> int:  # type: ignore[override]
        self.looked += 1
        return 15 if self.looked > 1 else 0

    @asked.setter
    def asked(self, number: int) -> None:
        pass


def test_a_stop_whose_checkpoint_fails_says_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, checkpoint.FileSystemWriter, "write_data", (1,))
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError) as caught:
        loop.train(job(tmp_path / "a", *TINY, "--run.checkpoint_every", "9", freeze=[]), "cpu", None, StopAt())
    assert str(caught.value) == (
        "stopped by SIGTERM, and checkpoint of step 2: rank 0 could not write: no space left on device; there is no earlier one"
    )
