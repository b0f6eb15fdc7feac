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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


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
        self.key = ledger.enter(self.tensor.untyped_storage(), is_message)

    def __del__(self) -> None:
        self.ledger.leave(self.key, self.is_message)


class _Storage:
    """Its bytes, and how many hold it as kept and as a message."""

    __slots__ = ("kept", "messages", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.kept = self.messages = 0


class Ledger:
    """Counts each storage once, however many graphs, values or messages hold it. Parameters that a rank owns do not count.

    It is asked for every tensor of every graph, some twenty times an action: bytes are added where a storage's first holder
    comes or its last one goes, and nowhere else.
    """

    def __init__(self, is_parameter: Callable[[int], bool]) -> None:
        self._is_parameter = is_parameter
        self._storages: dict[int, _Storage] = {}
        self._lock = threading.RLock()  # a send ends in a thread of its own
        self._kept = self._transit = 0
        self._high, self._most = (0, 0, 0), 0

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return self._kept

    @property
    def held(self) -> Held:
        """Between actions, when nothing runs."""
        return Held(self._kept, self._transit)

    @property
    def high(self) -> Held:
        """The most since `reset_high`, all three together."""
        return Held(*self._high)

    def keep(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)

    def carry(self, tensor: Tensor) -> Kept:
        """Of a message: it counts as kept where something else keeps it too."""
        return Kept(self, tensor, is_message=True)

    def graphs(self) -> AbstractContextManager[object]:
        """Within it, whatever autograd saves is on the ledger for as long as its graph lives; but for parameters, which stay."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, _saved)

    def _save(self, tensor: Tensor) -> Kept | Tensor:
        return tensor if type(tensor) is Parameter else Kept(self, tensor)

    def works(self, nbytes: int) -> None:
        """A part needs so many bytes beside all that is held, for a moment."""
        total = self._kept + self._transit + nbytes
        if total > self._most:
            self._most, self._high = total, (self._kept, self._transit, nbytes)

    def reset_high(self) -> None:
        self._most, self._high = self._kept + self._transit, (self._kept, self._transit, 0)

    def enter(self, storage: torch.UntypedStorage, is_message: bool) -> int:
        """The key to leave by."""
        pointer = storage.data_ptr()
        with self._lock:
            known = self._storages.get(pointer)
            if known is None:
                nbytes = 0 if self._is_parameter(pointer) else storage.nbytes()
                known = self._storages[pointer] = _Storage(nbytes)
            if is_message:
                known.messages += 1
                if known.messages > 1 or known.kept:
                    return pointer
                self._transit += known.nbytes
            else:
                known.kept += 1
                if known.kept > 1:
                    return pointer
                self._kept += known.nbytes
                if known.messages:
                    self._transit -= known.nbytes
            if self._kept + self._transit > self._most:
                self.reset_high()
        return pointer

    def leave(self, pointer: int, is_message: bool) -> None:
        with self._lock:
            known = self._storages[pointer]
            if is_message:
                known.messages -= 1
                if known.messages or known.kept:
                    return
                self._transit -= known.nbytes
            else:
                known.kept -= 1
                if known.kept:
                    return
                self._kept -= known.nbytes
                if known.messages:
                    self._transit += known.nbytes
                    return
            del self._storages[pointer]


def _saved(held: Kept | Tensor) -> Tensor:
    return held.tensor if type(held) is Kept else held  # type: ignore[return-value]
