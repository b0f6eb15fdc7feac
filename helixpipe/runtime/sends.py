"""Sends in flight: who holds a message's tensors until the backend has them, and lets them go at once then.

NCCL's requests can be asked whether they are complete. gloo's cannot (they only learn it by waiting), so
there a thread per peer waits for its sends in the order they were posted, which is the order they end in.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from helixpipe.model.attention import Holder
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
    """Sends to one rank, and the thread that waits for them. Its lock is its own: others' sends do not wake it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._flights: deque[InFlight | None] = deque()
        self._failed: SendError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="helixpipe-send")
        self._thread.start()

    def hold(self, flight: InFlight) -> None:
        with self._changed:
            self._raise()
            self._flights.append(flight)
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            while self._flights:
                self._raise()
                self._changed.wait()
            self._raise()

    def close(self) -> None:
        """The thread is gone when this returns: one that the interpreter's end meets inside the backend can crash it."""
        with self._changed:
            self._flights.append(None)
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._flights:
                    self._changed.wait()
                flight = self._flights[0]  # stays in the queue until it is complete
            if flight is None:
                return
            try:
                self._complete(flight)
            except RuntimeError as error:
                with self._changed:
                    self._failed = SendError(flight.message)
                    self._failed.__cause__ = error
                    self._changed.notify_all()
                return
            with self._changed:
                del flight  # requests go before anyone is told that they are complete, and may destroy the group
                self._flights.popleft()
                self._changed.notify_all()

    def _complete(self, flight: InFlight) -> None:
        for work in flight.works:
            work.wait(self._timeout)

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed
