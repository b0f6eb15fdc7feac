"""Metrics: whole lines in order, also where the disk was full for a while; and strict JSON."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_log import RECORD, job

from helixpipe.errors import ConfigError, HelixpipeError
from helixpipe.files import json_text
from helixpipe.hub.write import _strict
from helixpipe.train.log import Log
from helixpipe.train.metrics import MetricsFile


@contextmanager
def files_end_at(nbytes: int) -> Iterator[None]:
    """No file may be longer: what is written ends there, and then an error says so."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_that_cannot_be_written_wait_and_none_is_cut(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.add({"step": 1}) == ""
    with files_end_at(18):  # the first line and a half
        assert metrics.add({"step": 2}) == "file too large"
        assert metrics.path.read_text() == '{"step": 1}\n'
        assert metrics.add({"step": 3}) == "file too large"
        with pytest.raises(OSError, match="File too large"):
            metrics.flush()
    metrics.flush()
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3]
    assert metrics.add({"step": 4}) == ""


def test_a_run_whose_metrics_cannot_be_written_goes_on_and_fails_at_its_end_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with Log(job(run), 0, "cpu") as log:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()
        log.step(RECORD)
        log.step(RECORD)
        (run / "metrics.jsonl").rmdir()
        log.step(RECORD)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("helixpipe:")]
    assert said == [
        f"helixpipe: {run}/metrics.jsonl: cannot be written: is a directory; training goes on, and its lines wait until it can be"
    ]
    log = Log(job(run), 0, "cpu").__enter__()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    log.step(RECORD)
    with pytest.raises(HelixpipeError) as caught:
        log.__exit__(None, None, None)
    assert str(caught.value) == f"{run}/metrics.jsonl: cannot be written: is a directory; its last lines are lost"


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    given = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf}, "d": "NaN", "e": True}
    assert json.loads(json_text(given)) == {"a": [1.5, None, [None, 2]], "b": {"c": None}, "d": "NaN", "e": True}
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.add({"step": 1, "tokens_per_s": math.inf})
    assert metrics.path.read_text() == '{"step": 1, "tokens_per_s": null}\n'


def test_a_config_that_is_exported_has_no_number_that_is_not_finite() -> None:
    assert json.loads(_strict({"rope_theta": 1e4, "name": "NaN"}, "config.json")) == {"rope_theta": 1e4, "name": "NaN"}
    with pytest.raises(ConfigError) as caught:
        _strict({"a": 1, "time_step_limit": [0.0, math.inf]}, "config.json")
    assert str(caught.value) == (
        "config.json: time_step_limit is [0.0, Infinity], which is no JSON; change it in the folder that the run came from"
    )
