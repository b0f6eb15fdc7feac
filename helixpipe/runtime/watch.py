"""Watch: every rank tells what it is doing, so that a wait that fails can name who and what.

Each rank writes a line to the run's store about once a second. Whoever gives up waiting reads the lines.
"""

from __future__ import annotations

import threading
import time

from torch.distributed.distributed_c10d import Store

PERIOD_S = 1.0
# a rank that has not been heard for so long is taken for dead
SILENT_S = 5.0


class Watch:
    """`doing` is set by the executor at every instruction: an attribute, so that it costs nothing."""

    def __init__(self, store: Store | None, rank: int, ranks: int) -> None:
        self.doing: object = "nothing yet"
        self.rank, self.ranks, self._store = rank, ranks, store
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if store is not None:
            self._thread = threading.Thread(target=self._publish, daemon=True, name="helixpipe-watch")
            self._thread.start()

    def _publish(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self._tell(str(self.doing))
            except RuntimeError:
                return  # the store is gone: the run is over

    def _tell(self, line: str) -> None:
        assert self._store is not None
        self._store.set(f"watch/{self.rank}", f"{time.time()} {line}")

    def told(self, rank: int) -> str:
        """What a rank last said, in words: `doing ...` or that it has not been heard of."""
        if self._store is None or not self._store.check([f"watch/{rank}"]):
            return "it has not been heard of"
        when, line = self._store.get(f"watch/{rank}").decode().split(" ", 1)
        silent_s = time.time() - float(when)
        return (
            f"it has been silent for {silent_s:.0f} s; it was at {line}" if silent_s > SILENT_S else f"it is at {line}"
        )

    def silent(self) -> list[int]:
        """Ranks that have not been heard of lately."""
        others = (rank for rank in range(self.ranks) if rank != self.rank)
        return [rank for rank in others if "silent" in (line := self.told(rank)) or "not been" in line]

    def close(self) -> None:
        self._stop.set()
