"""Forked: local processes, one a rank, that start together and share what they import.

    caller ── stdin: a job, then signals ──> nursery   imports what the job needs, then forks; hosts the ranks' store
       ^                                        ├─ rank 0    a pipe back: what it made, or what its error says
       └────────── a pipe: all of it ───────────┤
                                                └─ rank 63   a pipe ahead, never written: its end says the nursery is gone

Forking is safe only before there are threads and groups, so it is done in a process of its own: torch is imported
once, and 64 ranks start within seconds and share its memory. Whoever dies, nobody remains: the end of a pipe
is noticed by the one who reads it. This is the caller's side; `nursery` is the other.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Protocol

from helixpipe import errors
from helixpipe.errors import RankError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

HOST = "127.0.0.1"
# between telling the nursery to end and making it
STOP_S = 5.0
# how often the caller is asked whether there is a signal to pass on
POLL_S = 0.05


class Ended(RankError):
    """A rank that ended without a word of ours: one line, and its traceback after an empty one where it raised."""


class Job(Protocol):
    """What the ranks do; it is pickled once, to the nursery."""

    @property
    def ranks(self) -> int: ...

    @property
    def limit_s(self) -> float:
        """All ranks are done by then, or it is an error."""
        ...

    def prepare(self) -> None:
        """In the nursery, before it forks: memory and locks that the ranks share."""
        ...

    def run(self, rank: int, store: Store) -> Any:
        """On each rank; what it returns is pickled. Raises HelixpipeError."""
        ...


def run_forked(
    job: Job,
    prints: bool = False,
    listener: socket.socket | None = None,
    asked: Callable[[], int] | None = None,
    blocked: Collection[int] = (),
) -> list[Any]:
    """What `job.run` returned, by rank. Raises what a rank raised, Ended for one that failed, died or took too long.

    `prints`: what ranks print is the caller's output, not something beside it. `listener`: where ranks meet, None for any
    port. `asked`: the last signal to pass on to all ranks, 0 while there is none; `blocked`: those that processes are started
    with blocked, so that ranks hear them once they can.
    """
    answers, theirs = os.pipe()
    meeting = listener or socket.create_server((HOST, 0), backlog=1024)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "helixpipe.runtime.nursery", str(theirs), str(meeting.fileno())],
            stdin=subprocess.PIPE, stdout=None if prints else 2, pass_fds=[theirs, meeting.fileno()], env=_environment(),
            start_new_session=True,  # Ctrl-C is the caller's, whose end of the pipe then tells the rest
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(theirs)
        meeting.close()
    assert process.stdin is not None
    try:
        told = pickle.dumps((sys.path, pickle.dumps(job)))
        _write(process.stdin, len(told).to_bytes(8) + told)
        with os.fdopen(answers, "rb", buffering=0) as pipe:
            text = _answer(pipe, process.stdin, asked)
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if not text:
        raise RankError(
            f"the process that starts the ranks {how(process.returncode)} before they were done; what it wrote is above"
        )
    made, error = pickle.loads(text)
    if error is not None:
        kind, said = error
        raise getattr(errors, kind)(said) if kind else Ended(said)
    return list(made)


def _answer(pipe: IO[bytes], stdin: IO[bytes], asked: Callable[[], int] | None) -> bytes:
    """All that the nursery says; it is told meanwhile what the caller is asked to pass on."""
    text, passed = bytearray(), 0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if selector.select(None if asked is None else POLL_S):
                if not (piece := pipe.read(1 << 16)):
                    return bytes(text)
                text += piece
            if asked is not None and asked() != passed:
                passed = asked()
                _write(stdin, bytes([passed]))


def _write(stdin: IO[bytes], text: bytes) -> None:
    with suppress(BrokenPipeError):  # it is dead already, which is found out now
        stdin.write(text)
        stdin.flush()


def _environment() -> dict[str, str]:
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # or every rank remarks on how its peers ended
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    local = {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    return quiet | local | dict(os.environ) | {"OMP_NUM_THREADS": "1"}


def how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
