"""Nursery: the process that forks the ranks of a job, watches them, and says what came of it. See `forked`.

`python -m helixpipe.runtime.nursery ANSWERS LISTENER`, of two open files: a pipe to the caller, and where ranks will meet.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from helixpipe.errors import HelixpipeError, RankError
from helixpipe.runtime.forked import HOST, Job, how

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# after a rank said that it lost another, so long for that one to be found dead
SETTLE_S = 2.0
# an error names no more silent ranks than these
MOST_SILENT = 4
# for a rank to reach the store
MEET_S = 60.0
# one wait for what ranks say, however long a job may take
LONGEST_S = 3600.0

Said = tuple[Any, tuple[str, str] | None]
"""What a rank made, or its error: kind and text; an error that is none of ours has no kind, and its traceback is the text."""


@dataclass
class _Rank:
    number: int
    pid: int
    pipe: int
    text: bytearray = field(default_factory=bytearray)
    code: int | None = None
    """How it ended, and when."""
    ended_s: float = 0.0
    raised_s: float = math.inf
    """When it raised its error: what others raise because of it comes later."""

    def reap(self) -> None:
        self.ended_s = time.monotonic()
        if self.text:
            *_, self.raised_s = pickle.loads(bytes(self.text))
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def failed(self) -> bool:
        return self.code not in (None, 0)

    @property
    def said(self) -> Said:
        return pickle.loads(bytes(self.text))[:2] if self.text else (None, None)

    @property
    def distance(self) -> int:
        """How far its end is from the cause: 0 killed, 1 said why, 2 an error that is none of ours, 3 lost another rank."""
        if self.code is not None and self.code < 0:
            return 0
        error = self.said[1]
        if error is None or not error[0]:
            return 2
        return 3 if error[0] == RankError.__name__ else 1


def _main() -> NoReturn:
    answers, listener = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    sys.path[:], told = pickle.loads(_told(int.from_bytes(_told(8))))
    job: Job = pickle.loads(told)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    job.prepare()
    ranks = _fork(job, listener, answers)
    try:
        port = listener.getsockname()[1]
        store = TCPStore(
            HOST, port, job.ranks, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )  # fmt: skip
        if _watch(ranks, job.limit_s):
            with os.fdopen(answers, "wb") as pipe:
                pickle.dump(_outcome(ranks, job.limit_s), pipe)
        del store
    finally:
        for rank in ranks:
            if rank.code is None:
                os.kill(rank.pid, signal.SIGKILL)
                rank.reap()
    os._exit(0)


def _told(count: int) -> bytes:
    """So many bytes of what the caller says, and not one more: the rest is watched for."""
    text = b""
    while len(text) < count:
        if not (piece := os.read(0, count - len(text))):
            os._exit(0)  # the caller is gone
        text += piece
    return text


def _fork(job: Job, listener: socket.socket, answers: int) -> list[_Rank]:
    gc.collect()
    gc.freeze()  # what the ranks share stays untouched, and shared
    life, held = os.pipe()
    ranks: list[_Rank] = []
    port = listener.getsockname()[1]
    for number in range(job.ranks):
        pipe, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            for other in (held, answers, pipe, listener.fileno(), *(rank.pipe for rank in ranks)):
                os.close(other)
            _be(job, number, port, life, report)
        os.close(report)
        ranks.append(_Rank(number, pid, pipe))
    os.close(life)
    return ranks


def _watch(ranks: list[_Rank], limit_s: float) -> bool:
    """Until all have ended, or one has failed and the cause is known, or time is up. False when the caller is gone."""
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
            for key, _ in selector.select(min(max(deadline - time.monotonic(), 0), LONGEST_S)):
                if key.data is None:
                    if not (number := os.read(0, 1)):
                        return False
                    for rank in ranks:
                        if rank.code is None:
                            os.kill(rank.pid, number[0])
                    continue
                text = os.read(key.fd, 1 << 16)
                key.data.text.extend(text)
                if not text:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    key.data.reap()
            failed = [rank for rank in ranks if rank.failed]
            if failed and min(rank.distance for rank in failed) <= 1:
                break
            if failed:
                deadline = min(deadline, time.monotonic() + SETTLE_S)
    return True


def _outcome(ranks: list[_Rank], limit_s: float) -> Said:
    """What all made, or the error to raise: the cause, not what followed from it."""
    failed = [rank for rank in ranks if rank.failed]
    if failed:
        cause = min(failed, key=lambda rank: (rank.distance, min(rank.raised_s, rank.ended_s)))
        error = cause.said[1]
        if error is not None and error[0]:
            return None, (error[0], error[1] + _silent(ranks) * (error[0] == RankError.__name__))
        assert cause.code is not None
        end = how(cause.code) if error is None else "failed"
        told = "" if error is None else f"\n\n{error[1]}"
        said = f"rank {cause.number} (pid {cause.pid}) {end}; the other ranks are stopped{told}"
    else:
        late = [rank.number for rank in ranks if rank.code is None]
        if not late:
            return [rank.said[0] for rank in ranks], None
        said = (
            f"no end after {limit_s:.0f} s of rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}; they are stopped"
        )
    return None, ("", said)


def _silent(ranks: list[_Rank]) -> str:
    """Who said nothing while others gave up waiting: perhaps the cause."""
    silent = [str(rank.number) for rank in ranks if rank.code is None]
    return f"; silent since: rank {', '.join(silent)}" if 0 < len(silent) <= MOST_SILENT else ""


# On a rank


def _be(job: Job, rank: int, port: int, life: int, report: int) -> NoReturn:
    code, text = 1, b""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        threading.Thread(target=_end_with, args=(life,), daemon=True, name="helixpipe-nursery").start()
        text, code = pickle.dumps((job.run(rank, _store(job.ranks, rank, port)), None, math.inf)), 0
    except HelixpipeError as error:
        text, code = pickle.dumps((None, (type(error).__name__, str(error)), time.monotonic())), 2
    except BaseException as error:
        text = pickle.dumps((None, ("", _traceback(error)), time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(report, "wb") as pipe:
        pipe.write(text)
    os._exit(code)  # without the waits for peers that tearing down a broken group would do


def _traceback(error: BaseException) -> str:
    """Its traceback, from where the caller's own code begins."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__") in ("__main__", "helixpipe.runtime.launch"):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__)).rstrip()


def _store(ranks: int, rank: int, port: int) -> Store:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(HOST, port, ranks, False, timedelta(seconds=MEET_S), wait_for_workers=False)
    except RuntimeError as error:
        raise RankError(f"rank {rank} did not meet the others: {' '.join(str(error).split())}") from None


def _end_with(life: int) -> None:
    """The other end closes when the nursery ends, however it does."""
    while os.read(life, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _main()
