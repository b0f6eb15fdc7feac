"""Ledger: the bytes of activations on a rank, counted by storage as they come and go.

    kept         what forwards keep for their backwards; values and gradients that wait for their reader; weights that
                 visit, and their gradients
    in transit   messages: from a send's posting to its end, from a receive's posting until its tensors are taken
    workspace    what a part needs only while it runs, as `parts` describes it

Their sum is what the allocator holds of a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """Bytes at one moment."""

    kept_bytes: int = 0
    transit_bytes: int = 0
    workspace_bytes: int = 0


class Kept:
    """A tensor on the ledger; off it again when nobody holds this any more."""

    __slots__ = ("is_message", "is_own", "key", "ledger", "tensor")

    def __init__(self, ledger: Ledger, tensor: Tensor, is_message: bool = False) -> None:
        # a detached alias: the graph must not hold the leaf, whose own data the tape may drop
        self.tensor = tensor.detach()
        self.ledger, self.is_message = ledger, is_message
        self.is_own = False
        """Whether nobody else holds its storage: it may be written to."""
        self.key = ledger.enter(self.tensor, is_message)

    def __del__(self) -> None:
        self.ledger.leave(self.key, self.is_message)


@dataclass
class _Storage:
    nbytes: int
    kept: int = 0
    messages: int = 0


class Ledger:
    """Counts each storage once, however many graphs, values or messages hold it. Parameters that a rank owns do not count."""

    def __init__(self, is_parameter: Callable[[int], bool]) -> None:
        self._is_parameter = is_parameter
        self._storages: dict[int, _Storage] = {}
        self._lock = threading.RLock()  # a send ends in a thread of its own
        self._kept = self._transit = 0
        self.high = Held()
        """The most since `reset_high`, all three together."""

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return self._kept

    @property
    def held(self) -> Held:
        """Between actions, when nothing runs."""
        return Held(self._kept, self._transit)

    def keep(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)

    def carry(self, tensor: Tensor) -> Kept:
        """Of a message: it counts as kept where something else keeps it too."""
        return Kept(self, tensor, is_message=True)

    def graphs(self) -> AbstractContextManager[object]:
        """Within it, whatever autograd saves is on the ledger for as long as its graph lives."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, _tensor)

    def works(self, nbytes: int) -> None:
        """A part needs so many bytes beside all that is held, for a moment."""
        if self._kept + self._transit + nbytes > sum(self.high):
            self.high = Held(self._kept, self._transit, nbytes)

    def reset_high(self) -> None:
        self.high = self.held

    def enter(self, tensor: Tensor, is_message: bool) -> int:
        """The key to leave by."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        with self._lock:
            known = self._storages.get(pointer)
            if known is None:
                nbytes = 0 if self._is_parameter(pointer) else storage.nbytes()
                known = self._storages[pointer] = _Storage(nbytes)
            self._count(known, -1)
            if is_message:
                known.messages += 1
            else:
                known.kept += 1
            self._count(known, 1)
            self.works(0)
        return pointer

    def leave(self, pointer: int, is_message: bool) -> None:
        with self._lock:
            known = self._storages[pointer]
            self._count(known, -1)
            if is_message:
                known.messages -= 1
            else:
                known.kept -= 1
            self._count(known, 1)
            if not known.kept and not known.messages:
                del self._storages[pointer]

    def _count(self, storage: _Storage, by: int) -> None:
        if storage.kept:
            self._kept += by * storage.nbytes
        elif storage.messages:
            self._transit += by * storage.nbytes


def _tensor(kept: Kept) -> Tensor:
    return kept.tensor
