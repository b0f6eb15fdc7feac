"""Watch: every rank tells what it is doing, so that a wait that fails can name who and what.

Each rank writes a line to the run's store about once a second. Whoever gives up waiting reads the lines. A device that is handed
its work ahead is where its last completed event is, and not where the CPU is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from helixpipe.errors import RankError
from helixpipe.runtime.oom import out_of_memory

PERIOD_S = 1.0
# a store behind a cut cable never answers
PATIENCE_S = 5.0
T = TypeVar("T")


@contextmanager
def starting(rank: int) -> Iterator[None]:
    """Around what all ranks do at once before there is a watch: they meet and make groups."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"rank {rank} waited for all ranks to start: {' '.join(str(error).split())}") from None


class Watch:
    """`doing` is set by the executor at every instruction: an attribute, so that it costs nothing."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        ranks: int,
        names: Sequence[str] | None = None,
        line: Sequence[int] | None = None,
    ) -> None:
        """`names` of all ranks; `line`: those of this rank's pipeline, by pipeline rank. None: ranks are all of them."""
        self.rank, self.ranks = rank, ranks
        self.names = names or [f"rank {other}" for other in range(ranks)]
        self.line = line or range(ranks)
        self.doing: object = "its first step"
        self.reached: Callable[[], str] = str
        """What its device is at, where that is behind what the CPU is doing; "" where it is not."""
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, daemon=True, name="helixpipe-watch")
        if store is not None:
            self._tell()
            self._thread.start()

    @property
    def me(self) -> str:
        return self.names[self.rank]

    def told(self, rank: int) -> str:
        """What a rank last said it was doing, and when. Raises nothing: it is asked while an error is told."""
        return self._said([rank])

    def others(self) -> str:
        """What the other ranks said, at most four of them."""
        return self._said([rank for rank in range(self.ranks) if rank != self.rank][:4])

    def _said(self, ranks: Sequence[int]) -> str:
        try:
            return "; ".join(_in_time(lambda: [self._read(rank) for rank in ranks]))
        except RuntimeError:
            told = " and ".join(self.names[rank] for rank in ranks)
            return f"{told} cannot be asked about: the run's store is gone too"

    def _read(self, rank: int) -> str:
        key = f"watch/{rank}"
        if self._store is None or not self._store.check([key]):
            return f"{self.names[rank]} was never heard of"
        when, line = self._store.get(key).decode().split(" ", 1)
        return f"{self.names[rank]} was last heard of {time.time() - float(when):.0f} s ago, at {line}"

    def placed(self, error: RankError) -> RankError:
        """The error with who this is and what the others said, where it does not say so yet."""
        if str(error).startswith(f"{self.me}, at "):
            return error
        return RankError(f"{self.me}, at {self.doing}, {error}; {self.others()}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do at once: a failure of the backend becomes who lost a rank, at what, and the others."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise  # no other rank's doing
            raise self.placed(RankError("lost a rank while waiting for all of them")) from error

    def patient(self, done: Future[T], timeout_s: float) -> T:
        """What a thread is to give, which waits for other ranks and may take long. Raises RankError where one of them, or the
        store, says nothing for `timeout_s` meanwhile.
        """
        heard: dict[str, tuple[bytes, float]] = {}
        while True:
            try:
                return done.result(timeout_s / 8)
            except TimeoutError:
                if done.done():
                    return done.result()  # it came just now, or failed by a timeout of its own
            silent = [name for name, since_s in self._since(heard).items() if since_s > timeout_s]
            if silent:
                raise self.placed(RankError(f"heard nothing of {' and '.join(silent[:4])} for {timeout_s:.0f} s"))

    def _since(self, heard: dict[str, tuple[bytes, float]]) -> dict[str, float]:
        """Of each other rank, or of the store, seconds since it said something new. `heard`: what was said last, and when."""
        now, others = time.monotonic(), [rank for rank in range(self.ranks) if rank != self.rank]
        store, said = self._store, dict[str, bytes]()
        if store is not None:
            with suppress(RuntimeError):
                words = _in_time(lambda: store.multi_get([f"watch/{rank}" for rank in others]))
                said = {self.names[rank]: word for rank, word in zip(others, words, strict=True)}
                said["the run's store"] = str(now).encode()  # it answered
        for name, word in said.items():
            if heard.get(name, (b"", 0.0))[0] != word:
                heard[name] = word, now
        if store is not None:
            heard.setdefault("the run's store", (b"", now))
        return {name: now - when for name, (_, when) in heard.items()}

    def close(self) -> None:
        """The thread is gone when this returns, unless the store keeps it."""
        self._stop.set()
        if self._store is not None:
            self._thread.join(PERIOD_S)

    def _publish(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self._tell()
            except RuntimeError:
                return  # the store is gone: the run is over

    def _tell(self) -> None:
        assert self._store is not None
        at = self.reached()
        line = f"{at}, as far as its device has come; its CPU is at {self.doing}" if at else self.doing
        self._store.set(f"watch/{self.rank}", f"{time.time()} {line}")


def _in_time(ask: Callable[[], T]) -> T:
    """What the store answers. Raises RuntimeError where it is gone, or says nothing for too long: its calls know no timeout."""
    answers: SimpleQueue[T | RuntimeError] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put(ask())
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=answer, daemon=True, name="helixpipe-watch-asks").start()
    try:
        found = answers.get(timeout=PATIENCE_S)
    except Empty:
        raise RuntimeError(f"no answer in {PATIENCE_S:.0f} s") from None
    if isinstance(found, RuntimeError):
        raise found
    return found
