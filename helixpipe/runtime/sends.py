"""Sends in flight: who holds a message's tensors until the backend has them, and lets them go at once then.

NCCL's requests can be asked whether they are complete. gloo's cannot (they only learn it by waiting), so
there a thread per peer waits for its sends in the order they were posted, which is the order they end in.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from threading import Event
from typing import Protocol

from helixpipe.model.function import Holder
from helixpipe.schedule.program import Message

# how long closing waits for a thread that is still at a send
CLOSE_S = 2.0


class Work(Protocol):
    """A torch.distributed request."""

    def wait(self, timeout: timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


@dataclass
class InFlight:
    """A message under way: its requests and the tensors they read or fill, which are on the ledger while it is."""

    message: Message
    works: Sequence[Work]
    held: Sequence[Holder]


class SendError(Exception):
    """A send that failed; `message` is the one."""

    def __init__(self, message: Message) -> None:
        self.message = message


class DeviceSends:
    """For requests that say when they are complete."""

    def __init__(self) -> None:
        self._flights: list[InFlight] = []

    def hold(self, flight: InFlight) -> None:
        self._flights = [f for f in self._flights if not all(work.is_completed() for work in f.works)]
        self._flights.append(flight)

    def finish(self) -> None:
        for flight in self._flights:
            for work in flight.works:
                work.wait()
        self._flights.clear()

    def close(self) -> None:
        """Nothing to stop."""


class HostSends:
    """For requests that must be waited for."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._peers: dict[int, _Peer] = {}

    def hold(self, flight: InFlight) -> None:
        peer = flight.message.dst
        if peer not in self._peers:
            self._peers[peer] = _Peer(self.timeout_s)
        self._peers[peer].hold(flight)

    def finish(self) -> None:
        """Wait for all of them; SendError when one fails."""
        for peer in self._peers.values():
            peer.finish()

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


class _Peer:
    """Sends to one rank, and the thread that waits for them, in their order. A mark among them is set when it is reached."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._queue: SimpleQueue[InFlight | Event | None] = SimpleQueue()
        self._failed: SendError | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True, name="helixpipe-send")
        self._thread.start()

    def hold(self, flight: InFlight) -> None:
        self._raise()
        self._queue.put(flight)

    def finish(self) -> None:
        mark = Event()
        self._queue.put(mark)
        mark.wait()
        self._raise()

    def close(self) -> None:
        """The thread is gone when this returns: one that the interpreter's end meets inside the backend can crash it."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)

    def _serve(self) -> None:
        while (each := self._queue.get()) is not None:
            if isinstance(each, Event):
                each.set()
            elif self._failed is None:
                try:
                    for work in each.works:
                        work.wait(self._timeout)
                except RuntimeError as error:
                    self._failed = SendError(each.message)
                    self._failed.__cause__ = error
            del each  # requests go before anyone is told that they are complete, and may destroy the group

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed
