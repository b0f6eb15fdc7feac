"""Launch: start the ranks of a job on this machine and watch them, or join those that torchrun started.

launcher ── hosts the store where ranks meet, so that it outlives any rank
   ├─ rank 0   stdin: the job, then silence; its end tells a rank that the launcher is gone
   ├─ rank 1   a pipe back: the one line of an error, for the launcher to show once
   └─ ...
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from helixpipe import errors
from helixpipe.errors import ConfigError, HelixpipeError, RankError
from helixpipe.train.job import Job, Prepare
from helixpipe.train.lock import claimed
from helixpipe.train.manifest import checkpoints
from helixpipe.train.stop import SIGNALS, STOPPED, Stop

POLL_S = 0.05
# after a rank said that it lost another, so long for that one to be found dead
SETTLE_S = 2.0
# between asking a rank to end and making it
STOP_S = 3.0
HOST = "127.0.0.1"


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    report: int
    """Where its error can be read, once it has ended."""
    said: HelixpipeError | None = None

    def ended(self) -> bool:
        """Whether it is over; reads its report when it is."""
        if self.process.poll() is None:
            return False
        if self.report >= 0:
            with os.fdopen(self.report, "rb") as pipe:
                text = pipe.read()
            self.report = -1
            if text:
                kind, message = json.loads(text)
                self.said = getattr(errors, kind)(message)
        return True

    @property
    def failed(self) -> bool:
        return self.ended() and self.process.returncode not in (0, STOPPED)

    def __str__(self) -> str:
        return f"rank {self.number} (pid {self.process.pid})"


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


def _launch(job: Job, stop: Stop) -> int:
    listener = _listen(job.config.runtime.port)
    port = listener.getsockname()[1]
    ranks: list[_Rank] = []
    try:
        for number in range(job.config.mesh_shape().size):
            ranks += [_start(job, number, port)]  # one by one, so that those started are stopped
        with _host(listener, len(ranks)):  # imports torch while the ranks do
            told = 0
            while not all(rank.ended() for rank in ranks):
                if any(rank.failed for rank in ranks):
                    break
                if stop.asked != told:
                    told = stop.asked
                    for rank in ranks:
                        rank.process.send_signal(told if told != signal.SIGINT else signal.SIGTERM)
                time.sleep(POLL_S)
            return _outcome(job, ranks)
    finally:
        _stop(ranks)


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


@contextmanager
def _host(listener: socket.socket, ranks: int) -> Iterator[None]:
    """Serve the store on the socket."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        HOST, listener.getsockname()[1], ranks, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    try:
        yield
    finally:
        del store


def _start(job: Job, number: int, port: int) -> _Rank:
    """Start a rank and give it the job."""
    report, back = os.pipe()
    try:
        with _interrupts_held():
            process = subprocess.Popen(
                [sys.executable, "-m", "helixpipe.train.worker"],
                stdin=subprocess.PIPE, pass_fds=[back], env=_environment(job, number, port),
            )  # fmt: skip
    finally:
        os.close(back)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps([job.to_json(), back]).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it is dead already, which is found out soon
    return _Rank(number, process, report)


def _environment(job: Job, number: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    ranks, threads = job.config.mesh_shape().size, job.config.runtime.threads
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # or every rank remarks on how its peers ended
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    local = {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    return quiet | local | dict(os.environ) | {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": HOST, "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip


def _outcome(job: Job, ranks: list[_Rank]) -> int:
    """What to tell the user of ranks of which one or all have ended: the cause, not what followed from it."""
    failed = [rank for rank in ranks if rank.failed]
    if not failed:
        return max(rank.process.returncode for rank in ranks)
    deadline = time.monotonic() + SETTLE_S
    while min(map(_distance, failed)) > 1 and time.monotonic() < deadline and not all(rank.ended() for rank in ranks):
        time.sleep(POLL_S)
        failed = [rank for rank in ranks if rank.failed]
    cause = min(failed, key=_distance)
    if cause.said is not None:
        raise cause.said
    code = cause.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(
        f"helixpipe: error: {cause} {how}; the other ranks are stopped{_going_on(job)}",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _going_on(job: Job) -> str:
    """What is left to go on from; nothing of an evaluation."""
    if job.task == "evaluate":
        return ""
    found = checkpoints(job.checkpoints)
    return f"; --resume continues from {found[-1].name}" if found else "; there is no checkpoint yet"


def _distance(rank: _Rank) -> int:
    """How far a rank's end is from the cause: 0 killed, 1 said why, 2 ended without a word, 3 lost another rank."""
    if rank.process.returncode < 0:
        return 0
    if rank.said is None:
        return 2
    return 3 if isinstance(rank.said, RankError) else 1


def _stop(ranks: list[_Rank]) -> None:
    """End whatever still runs: a rank whose launcher is silent for good ends by itself, or is killed."""
    for rank in ranks:
        if rank.process.stdin is not None:
            rank.process.stdin.close()
    deadline = time.monotonic() + STOP_S
    for rank in ranks:
        try:
            rank.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        rank.ended()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal: ranks inherit that they leave it to the launcher.

    The signals that ask for an end wait until a rank can hear them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
