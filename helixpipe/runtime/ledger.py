"""Ledger: the bytes that forwards keep for their backwards, counted by storage as they come and go.

With them count gradients that wait between actions: of weights put off, and owed to earlier segments' keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor


class Kept:
    """A tensor on the ledger; off it again when nobody holds this any more."""

    __slots__ = ("ledger", "pointer", "tensor")

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        # a detached alias: the graph must not hold the leaf, whose own data the tape may drop
        self.tensor = tensor.detach()
        storage = self.tensor.untyped_storage()
        self.ledger, self.pointer = ledger, storage.data_ptr()
        ledger.enter(self.pointer, storage.nbytes())

    def __del__(self) -> None:
        self.ledger.leave(self.pointer)


@dataclass
class _Storage:
    holders: int
    nbytes: int


class Ledger:
    """Counts each storage once, however many graphs or inputs keep it. Parameters do not count."""

    def __init__(self, is_parameter: Callable[[int], bool]) -> None:
        self._is_parameter = is_parameter
        self._storages: dict[int, _Storage] = {}
        self.bytes = 0
        self.high_bytes = 0
        """The most since `reset_high`."""

    def keep(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)

    def graphs(self) -> AbstractContextManager[object]:
        """Within it, whatever autograd saves is on the ledger for as long as its graph lives."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, _tensor)

    def reset_high(self) -> None:
        self.high_bytes = self.bytes

    def enter(self, pointer: int, nbytes: int) -> None:
        storage = self._storages.get(pointer)
        if storage is None:
            storage = self._storages[pointer] = _Storage(0, 0 if self._is_parameter(pointer) else nbytes)
            self.bytes += storage.nbytes
            self.high_bytes = max(self.high_bytes, self.bytes)
        storage.holders += 1

    def leave(self, pointer: int) -> None:
        storage = self._storages[pointer]
        storage.holders -= 1
        if not storage.holders:
            self.bytes -= storage.nbytes
            del self._storages[pointer]


def _tensor(kept: Kept) -> Tensor:
    return kept.tensor
