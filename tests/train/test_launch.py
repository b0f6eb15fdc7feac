"""The launcher: whom it blames, and that it ends as gently as it can."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from helixpipe.config import Config
from helixpipe.errors import DataError, HelixpipeError, RankError
from helixpipe.train import launch
from helixpipe.train.job import Job

pytestmark = pytest.mark.timeout(60)

JOB = Job(Config(), None, 0)


def rank(number: int, code: str, said: HelixpipeError | None = None) -> launch._Rank:
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return launch._Rank(number, process, -1, said)


KILLED = "import os; os.kill(os.getpid(), 9)"
SAID = "import sys; sys.exit(2)"
LOST = "import time, sys; time.sleep(0.2); sys.exit(2)"
BROKE = "raise RuntimeError"
RUNS = "import sys; sys.stdin.read()"


def outcome(*ranks: launch._Rank, job: Job = JOB) -> int:
    try:
        while not any(each.failed for each in ranks):
            time.sleep(0.01)
        return launch._outcome(job, list(ranks))
    finally:
        launch._stop(list(ranks))
        assert all(each.process.returncode is not None for each in ranks)


def test_a_killed_rank_is_blamed_before_those_that_lost_it(capsys: pytest.CaptureFixture[str]) -> None:
    killed = rank(1, "import time; time.sleep(0.5);" + KILLED)
    assert outcome(rank(0, SAID, RankError("rank 0 lost rank 1")), killed, rank(2, RUNS)) == 1
    assert capsys.readouterr().err == (
        f"helixpipe: error: rank 1 (pid {killed.process.pid}) was killed by SIGKILL; the other ranks are stopped; "
        "there is no checkpoint yet\n"
    )


def test_an_evaluation_leaves_nothing_to_go_on_from(capsys: pytest.CaptureFixture[str]) -> None:
    killed = rank(0, KILLED)
    assert outcome(killed, rank(1, RUNS), job=Job(Config(), None, 0, "evaluate")) == 1
    assert capsys.readouterr().err == (
        f"helixpipe: error: rank 0 (pid {killed.process.pid}) was killed by SIGKILL; the other ranks are stopped\n"
    )


def test_a_reason_is_told_once_and_before_what_followed_from_it() -> None:
    with pytest.raises(DataError, match=r"^short$"):
        outcome(rank(0, SAID, RankError("lost")), rank(1, SAID, DataError("short")), rank(2, RUNS))
    with pytest.raises(RankError, match=r"^rank 0 waited$"):
        outcome(rank(0, SAID, RankError("rank 0 waited")), rank(1, RUNS))


def test_a_rank_that_ends_without_a_word_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(rank(0, LOST, RankError("lost")), rank(1, BROKE)) == 1
    assert " ended with exit code 1; " in capsys.readouterr().err


def test_a_rank_that_stops_as_asked_has_not_failed() -> None:
    stopped = "import sys; sys.exit(75)"
    ranks = [rank(0, stopped), rank(1, stopped)]
    while not all(each.ended() for each in ranks):
        time.sleep(0.01)
    assert not any(each.failed for each in ranks)
    assert launch._outcome(JOB, ranks) == 75


def test_a_rank_that_does_not_end_by_itself_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STOP_S", 0.3)
    stubborn = rank(0, "import time; time.sleep(60)")
    launch._stop([stubborn])
    assert stubborn.process.returncode == -signal.SIGKILL


def test_sigterm_ends_a_run_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), launch._terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
