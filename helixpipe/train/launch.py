"""Launch: start the ranks of a job on this machine and watch them, or join those that torchrun started.

launcher ── Stop hears signals, for all ranks
   └─ nursery (`runtime.forked`)   imports torch once, hosts the store where ranks meet
         ├─ rank 0
         ├─ rank 1   what it returns is its exit code, and its error the one line to show
         └─ ...
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from helixpipe.errors import ConfigError
from helixpipe.runtime.forked import HOST, Ended, run_forked
from helixpipe.train.job import Job, Prepare
from helixpipe.train.lock import claimed
from helixpipe.train.manifest import checkpoints
from helixpipe.train.stop import SIGNALS, Stop

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


def launch(arguments: Sequence[str], prepare: Prepare) -> int:
    """Run the job of a command's arguments; the exit code. Raises HelixpipeError for what a user can mend."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from helixpipe.train.worker import join

        return join(arguments, warn, prepare)
    job, stop = prepare(arguments, warn), Stop()
    try:
        with claimed(job) as job, stop.listening() if job.task == "train" else _terminated_as_interrupted():
            if job.config.mesh_shape().size == 1:
                from helixpipe.runtime.place import Place
                from helixpipe.train.worker import work

                return work(job, Place(0, 1, 0, 1), None, stop)
            return _launch(job, stop)
    except KeyboardInterrupt:
        warn(f"interrupted{_going_on(job)}")
        return 130


def warn(line: str) -> None:
    """A line for the user that is no error."""
    print(f"helixpipe: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Ranks:
    """The job as the nursery's ranks do it."""

    job: Job

    @property
    def ranks(self) -> int:
        return self.job.config.mesh_shape().size

    @property
    def limit_s(self) -> float:
        return math.inf

    def prepare(self) -> None:
        """What every rank imports; torch's optimizers its compiler, though they do not use it."""
        import torch._dynamo  # noqa: F401

        import helixpipe.train.worker  # noqa: F401

    def run(self, rank: int, store: Store) -> int:
        from helixpipe.runtime.place import Place
        from helixpipe.train.worker import work

        place, stop = Place(rank, self.ranks, rank, self.ranks), Stop()
        place.to_environment()
        with stop.listening():
            return work(self.job, place, store, stop)


def _launch(job: Job, stop: Stop) -> int:
    listener = _listen(job.config.runtime.port)
    try:
        # Ctrl-C is the launcher's: ranks are told to stop, by a signal that none of them hears from a terminal
        codes: list[int] = run_forked(Ranks(job), True, listener, lambda: _passed_on(stop.asked), SIGNALS)
        return max(codes)
    except Ended as error:
        line, _, trace = str(error).partition("\n\n")
        told = [trace] if trace else []
        print(*told, f"helixpipe: error: {line}{_going_on(job)}", sep="\n", file=sys.stderr, flush=True)
        return 1


def _passed_on(asked: int) -> int:
    return signal.SIGTERM if asked == signal.SIGINT else asked


def _listen(port: int) -> socket.socket:
    """A socket where ranks will meet, bound before any of them starts."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"runtime.port: {port} cannot be used: {(error.strerror or str(error)).lower()}; choose another, or 0 for any free one"
        ) from None
    return listener


def _going_on(job: Job) -> str:
    """What is left to go on from; nothing of an evaluation."""
    if job.task == "evaluate":
        return ""
    found = checkpoints(job.checkpoints)
    return f"; --resume continues from {found[-1].name}" if found else "; there is no checkpoint yet"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: ranks first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
