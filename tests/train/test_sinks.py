"""Sinks: what a run tells TensorBoard and Weights & Biases, and that neither can hold it up or end it.

Both are stood in for by modules that record their calls, with the signatures that they document.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helixpipe.config import Config
from helixpipe.config_text import build_config
from helixpipe.errors import ConfigError
from helixpipe.predict.timeline import Timeline
from helixpipe.train.job import Job, prepare
from helixpipe.train.log import Log
from helixpipe.train.record import StepRecord
from helixpipe.train.sinks import sink as sinks

RECORD = StepRecord(1, 2.5, 0.75, 1e-3, 2.0, Timeline(((),), ((),)).totals)
Call = tuple[Any, ...]


def job(folder: Path, *names: str, step: int = 0) -> Job:
    run = dataclasses.replace(Config().run, folder=str(folder), log=names)
    return Job(dataclasses.replace(Config(), run=run), None, step)


def run(job: Job, *steps: int) -> None:
    with Log(job, 0, "cpu") as log:
        for step in steps:
            log.step(RECORD._replace(step=step, loss=2.5 - step / 100))
            log.evaluation(step, 3.0)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "run.log" in line]


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, calls: list[Call]) -> Iterator[None]:
    """The two libraries; each sink's file is imported anew."""

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            calls.append(("writer", log_dir, purge_step))
            Path(log_dir).mkdir(parents=True, exist_ok=True)

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            calls.append((tag, scalar_value, global_step))

        def flush(self) -> None: ...

        def close(self) -> None:
            calls.append(("closed",))

    class Run:
        url, offline = "https://wandb.example/run", False

        def log(self, data: dict[str, float], step: int) -> None:
            calls.append(("log", data.get("loss", data.get("held_out_loss")), step))

        def finish(self) -> None:
            calls.append(("finished",))

    def init(**given: Any) -> Run:
        calls.append(("init", given))
        return Run()

    modules = {
        "torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=SummaryWriter),
        "wandb": types.SimpleNamespace(init=init, setup=lambda settings: settings, Settings=lambda **given: given),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in sinks.SINKS:
        monkeypatch.delitem(sys.modules, f"helixpipe.train.sinks.{name}", raising=False)
    yield
    for name in sinks.SINKS:
        sys.modules.pop(f"helixpipe.train.sinks.{name}", None)


def test_tensorboard_has_every_number_by_step(
    tmp_path: Path, calls: list[Call], capsys: pytest.CaptureFixture[str]
) -> None:
    run(job(tmp_path, "tensorboard"), 1, 2)
    assert calls[0] == ("writer", str(tmp_path / "tensorboard"), None)
    assert calls[-1] == ("closed",)
    assert [call for call in calls if call[0] in ("loss", "held_out_loss")] == [
        ("loss", 2.49, 1), ("held_out_loss", 3.0, 1), ("loss", 2.48, 2), ("held_out_loss", 3.0, 2),
    ]  # fmt: skip
    assert ("tokens_per_s", 2048.0, 2) in calls
    assert not any(call[1] is None for call in calls[1:-1])
    assert said(capsys) == [f"helixpipe: run.log: tensorboard writes to {tmp_path / 'tensorboard'}"]


@pytest.mark.parametrize(("step", "purged"), [(0, 0), (5, 6)])
def test_what_an_earlier_course_told_tensorboard_is_hidden(
    tmp_path: Path, calls: list[Call], step: int, purged: int
) -> None:
    (tmp_path / "tensorboard").mkdir()
    run(job(tmp_path, "tensorboard", step=step), step + 1)
    assert calls[0] == ("writer", str(tmp_path / "tensorboard"), purged)


def test_wandb_has_one_run_for_a_folder_and_is_told_no_step_twice(
    tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_NAME", "mine")
    run(job(tmp_path / "a", "wandb"), 1, 2)
    ((_, given),) = [call for call in calls if call[0] == "init"]
    assert (given["project"], given["name"], given["dir"]) == ("helixpipe", "mine", str(tmp_path / "a"))
    assert given["config"]["train"]["steps"] == 120
    assert "mode" not in given, "WANDB_MODE says it"
    assert given["settings"]["silent"], "it would ask a terminal for a key"
    assert given["settings"]["finish_timeout"] < sinks.CLOSE_S
    assert calls[1:] == [
        ("log", 2.49, 1), ("log", 3.0, 1), ("log", 2.48, 2), ("log", 3.0, 2), ("finished",),
    ]  # fmt: skip
    assert said(capsys) == ["helixpipe: run.log: wandb writes to https://wandb.example/run"]
    kept = json.loads((tmp_path / "a" / "wandb.json").read_text())
    assert kept == {"id": given["id"], "step": 2}
    calls.clear()
    run(job(tmp_path / "a", "wandb", step=1), 2, 3)  # from the checkpoint of step 1
    assert (calls[0][1]["id"], calls[0][1]["resume"]) == (given["id"], "allow")
    assert calls[1:] == [("log", 2.47, 3), ("log", 3.0, 3), ("finished",)]
    calls.clear()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "wandb.json").write_text("{")
    run(job(tmp_path / "b", "wandb"), 1)
    assert calls[0][1]["id"] != given["id"]


def broken(name: str, where: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let a library raise at its making, at a number, or at its end."""

    def fails(*given: Any, **more: Any) -> None:
        raise error

    library = sys.modules["torch.utils.tensorboard" if name == "tensorboard" else "wandb"]
    if where == "opening":
        monkeypatch.setattr(library, "SummaryWriter" if name == "tensorboard" else "init", fails)
    elif name == "tensorboard":
        monkeypatch.setattr(library.SummaryWriter, "add_scalar" if where == "writing" else "close", fails)
    else:
        monkeypatch.setattr(type(library.init()), "log" if where == "writing" else "finish", fails)


@pytest.mark.parametrize("where", ["opening", "writing", "closing"])
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_that_fails_costs_one_line_and_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, where: str
) -> None:
    broken(name, where, monkeypatch, OSError(28, "No space left on device"))
    other = "wandb" if name == "tensorboard" else "tensorboard"
    run(job(tmp_path, name, other), 1, 2, 3)
    dropped = [line for line in said(capsys) if "dropped" in line]
    assert dropped == [
        f"helixpipe: run.log: {name} is dropped, OSError: [Errno 28] No space left on device; the run goes on, and "
        "metrics.jsonl has every number"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_library_that_ends_its_process_ends_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("wandb", "opening", monkeypatch, SystemExit(1))
    run(job(tmp_path, "wandb"), 1)
    assert [line.split(";")[0] for line in said(capsys)] == ["helixpipe: run.log: wandb is dropped, SystemExit: 1"]


def test_a_network_that_does_not_answer_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **given: answered.wait(60))
    monkeypatch.setattr(sinks, "CLOSE_S", 0.0)
    monkeypatch.setattr(sinks, "MOST_WAITING", 3)
    try:
        with Log(job(tmp_path / "full", "wandb"), 0, "cpu") as log:
            for step in (1, 2, 3, 4, 5):
                log.step(RECORD._replace(step=step))
        assert [line for line in said(capsys) if "dropped" in line] == [
            "helixpipe: run.log: wandb is dropped, it is 3 lines behind; the run goes on, and metrics.jsonl has every number"
        ]
        with Log(job(tmp_path / "late", "wandb"), 0, "cpu") as log:
            log.step(RECORD)
        assert said(capsys) == [
            "helixpipe: run.log: wandb is dropped, it did not end in 0 s; the run goes on, and metrics.jsonl has every number"
        ]
    finally:
        answered.set()
        for thread in threading.enumerate():
            if thread.name == "helixpipe-wandb":
                thread.join(60)


def test_no_other_rank_opens_one(tmp_path: Path, calls: list[Call]) -> None:
    with Log(job(tmp_path, "wandb", "tensorboard"), 1, "cpu") as log:
        log.step(RECORD)
    assert not calls


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    specs: dict[str, Callable[[str], Any]] = {
        "missing": lambda module: None,
        "a folder of that name": lambda module: types.SimpleNamespace(origin=None),
    }
    for find in specs.values():
        monkeypatch.setattr(sinks, "find_spec", find)
        with pytest.raises(ConfigError) as caught:
            prepare(["--run.log", name], lambda line: None)
        assert str(caught.value) == (
            f"run.log: {name} needs {name}, which is not installed; pip install 'helixpipe[logging]', or leave it out"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (["tensorbord"], "run.log: 'tensorbord' is not known; did you mean 'tensorboard'?"),
        (["wandb", "wandb"], "run.log: wandb, wandb; name each once"),
        ("wandb", "run.log: 'wandb' will not do; give a list, each one of tensorboard, wandb"),
    ],
)
def test_bad_values_are_one_line(value: Any, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"run": {"log": value}})
    assert str(caught.value) == fault
