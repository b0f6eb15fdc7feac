"""The launcher: what it tells of ranks that failed, and which signals it passes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from helixpipe.config import Config
from helixpipe.errors import DataError
from helixpipe.runtime.forked import Ended
from helixpipe.train import launch
from helixpipe.train.job import Job
from helixpipe.train.stop import SIGNALS, Stop

JOB = Job(Config(), None, 0)


def ranks_that(monkeypatch: pytest.MonkeyPatch, what: Callable[..., list[int]]) -> None:
    """Instead of processes."""

    def run(job: Any, prints: bool, listener: Any, *more: Any) -> list[int]:
        listener.close()
        return what(job, *more)

    monkeypatch.setattr(launch, "run_forked", run)


def failing(error: Exception) -> Callable[..., list[int]]:
    def run(*given: Any) -> list[int]:
        raise error

    return run


KILLED = "rank 1 (pid 12) was killed by SIGKILL; the other ranks are stopped"


def test_a_rank_that_ends_without_a_word_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks_that(monkeypatch, failing(Ended(KILLED)))
    assert launch._launch(JOB, Stop()) == 1
    assert capsys.readouterr().err == f"helixpipe: error: {KILLED}; there is no checkpoint yet\n"


def test_an_evaluation_leaves_nothing_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks_that(monkeypatch, failing(Ended(KILLED)))
    assert launch._launch(Job(Config(), None, 0, "evaluate"), Stop()) == 1
    assert capsys.readouterr().err == f"helixpipe: error: {KILLED}\n"


def test_what_a_rank_did_not_expect_has_its_traceback_above_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks_that(monkeypatch, failing(Ended("rank 1 (pid 12) failed\n\nTraceback:\n  there\n\nValueError: no")))
    assert launch._launch(JOB, Stop()) == 1
    assert capsys.readouterr().err == (
        "Traceback:\n  there\n\nValueError: no\nhelixpipe: error: rank 1 (pid 12) failed; there is no checkpoint yet\n"
    )


def test_an_error_of_a_rank_is_the_command_s(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that(monkeypatch, failing(DataError("short")))
    with pytest.raises(DataError, match=r"^short$"):
        launch._launch(JOB, Stop())


def test_ranks_that_stop_as_asked_have_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_that(monkeypatch, lambda job, *more: [75] * job.ranks)
    assert launch._launch(JOB, Stop()) == 75


def test_ranks_are_told_of_every_signal_and_hear_ctrl_c_from_the_launcher_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(job: Any, asked: Callable[[], int], blocked: Any) -> list[int]:
        assert set(blocked) == set(SIGNALS) == {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
        for heard, passed in ((0, 0), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGINT, signal.SIGTERM)):
            stop.asked = heard
            assert asked() == passed
        return [0]

    stop = Stop()
    ranks_that(monkeypatch, run)
    assert launch._launch(JOB, stop) == 0


def test_sigterm_ends_a_run_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), launch._terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
