"""Forked ranks: what they make comes back, and whatever goes wrong, it is named and no process remains.

No torch in this file: the process that forks brings it in for the store alone.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helixpipe.errors import CheckpointError, RankError
from helixpipe.runtime import forked
from helixpipe.runtime.forked import Ended, run_forked
from helixpipe.runtime.nursery import _outcome, _Rank

RANKS = 3


@dataclass
class Job:
    """Rank 1 meets its fate."""

    fate: str = ""
    ranks: int = RANKS
    limit_s: float = 60.0
    shared: int = 0

    def prepare(self) -> None:
        self.shared = os.getpid()

    def run(self, rank: int, store: Any) -> Any:
        store.set(str(rank), str(rank))
        others = [int(store.get(str(other))) for other in range(self.ranks)]
        if self.fate and rank == 1:
            if self.fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fate == "faulty":
                raise ValueError("a fault in the code")
            if self.fate == "refused":
                raise CheckpointError("this is how it is")
            if self.fate == "lost":
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
        if self.fate == "lost":
            raise RankError("lost rank 1")
        if self.fate:
            time.sleep(60)
        return self.shared == os.getppid(), others, "x" * 1_000_000  # more than a pipe holds


def members(session: int) -> list[int]:
    """Processes of a session: the nursery's own and all that it forked."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def nurseries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of nurseries as they start, each of them a session."""
    started: list[int] = []

    class Recording(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            started.append(self.pid)

    monkeypatch.setattr(forked.subprocess, "Popen", Recording)
    return started


def test_what_ranks_make_comes_back_by_rank(nurseries: list[int]) -> None:
    assert run_forked(Job()) == [(True, [0, 1, 2], "x" * 1_000_000)] * RANKS
    assert members(nurseries[0]) == []


@pytest.mark.parametrize(
    ("fate", "kind", "message"),
    [
        ("killed", Ended, r"rank 1 \(pid \d+\) was killed by SIGKILL; the other ranks are stopped"),
        ("lost", Ended, r"rank 1 \(pid \d+\) was killed by SIGKILL; the other ranks are stopped"),
        (
            "faulty",
            Ended,
            r"(?s)rank 1 \(pid \d+\) failed; the other ranks are stopped\n\nTraceback.*\nValueError: a fault in the code",
        ),
        ("refused", CheckpointError, r"this is how it is"),
        ("slow", Ended, r"no end after 1 s of ranks 0, 1, 2; they are stopped"),
    ],
)
def test_the_cause_is_named_and_no_process_remains(
    fate: str, kind: type[Exception], message: str, nurseries: list[int]
) -> None:
    with pytest.raises(kind) as raised:
        run_forked(Job(fate, limit_s=1.0 if fate == "slow" else 60.0))
    assert re.fullmatch(message, str(raised.value))
    (nursery,) = nurseries
    assert members(nursery) == []


def ended(number: int, code: int, kind: str = "", text: str = "", at_s: float = 1.0) -> _Rank:
    """A rank that is over: killed, without a word, or with an error."""
    said = pickle.dumps((None, (kind, text), at_s)) if text else b""
    return _Rank(number, 10 + number, -1, bytearray(said), code, at_s, at_s)


def test_a_reason_is_told_once_and_before_what_followed_from_it() -> None:
    runs = _Rank(2, 12, -1)
    lost = ended(0, 2, "RankError", "lost", 0.5)
    assert _outcome([lost, ended(1, 2, "DataError", "short"), runs], 9) == (None, ("DataError", "short"))
    assert _outcome([lost, ended(1, 2, "RankError", "waited"), ended(2, 0)], 9) == (None, ("RankError", "lost"))
    assert _outcome([lost, ended(1, 0), runs], 9) == (None, ("RankError", "lost; silent since: rank 2"))
    stopped = "; the other ranks are stopped"
    assert _outcome([lost, ended(1, 1)], 9) == (None, ("", f"rank 1 (pid 11) ended with exit code 1{stopped}"))
    fault = ended(1, 1, "", "Traceback")
    assert _outcome([lost, fault], 9) == (None, ("", f"rank 1 (pid 11) failed{stopped}\n\nTraceback"))
    killed = ended(1, -9, at_s=2.0)
    assert _outcome([ended(0, 2, "DataError", "short"), killed, runs], 9) == (
        None, ("", f"rank 1 (pid 11) was killed by SIGKILL{stopped}"),
    )  # fmt: skip


class Signalled(Job):
    """Every rank waits for a signal."""

    def run(self, rank: int, store: Any) -> Any:
        return signal.sigwait({signal.SIGUSR1}), store.port


def test_a_signal_is_passed_on_to_ranks_that_meet_where_they_are_told() -> None:
    listener = socket.create_server((forked.HOST, 0))
    port = listener.getsockname()[1]
    found = run_forked(Signalled(), listener=listener, asked=lambda: signal.SIGUSR1, blocked=[signal.SIGUSR1])
    assert found == [(signal.SIGUSR1, port)] * RANKS
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


CALLER = """
from test_forked import Job
from helixpipe.runtime.forked import run_forked
run_forked(Job("slow"))
"""


@pytest.mark.parametrize("gone", ["caller", "nursery"])
def test_ranks_end_with_the_caller_and_with_the_nursery(gone: str) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parent)}
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        nursery = eventually(lambda: children(caller.pid), 1)[0]
        eventually(lambda: members(nursery), 1 + RANKS)
        os.kill(caller.pid if gone == "caller" else nursery, signal.SIGKILL)
        _, told = caller.communicate(timeout=20)
        eventually(lambda: [] if members(nursery) else ["none"], 1)
    finally:
        caller.kill()
        caller.communicate()
    if gone == "nursery":
        assert "the process that starts the ranks was killed by SIGKILL before they were done" in told


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def eventually(look: Any, count: int) -> list[Any]:
    deadline = time.monotonic() + 60
    while len(found := look()) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return list(found)
