"""Lean: what a recomputed graph of a chunk does without. It is as exact as a kept one, and its widest moment is narrower.

    n             is cheap to make: the graph keeps what it is made of, and it is made again in qkv's backward
    dq, dk, dv    take the places of q, k and v, a few heads at a time, where nobody else reads these

Both concern parts of this library alone: someone else's module may keep what it makes, or change what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from helixpipe.model.linear import WeightQueue
from helixpipe.model.norm import NORMS
from helixpipe.model.qkv import QKV
from helixpipe.parts.part import Part, Value
from helixpipe.runtime.ledger import Kept, Ledger
from helixpipe.runtime.live import Live
from helixpipe.schedule.chunks import Chunk


class MadeAgain:
    """What a graph keeps of a cheap value: its maker and what that reads. The first reader has it made, for all of them."""

    def __init__(self, ledger: Ledger, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._ledger, self._module, self._inputs = ledger, module, list(map(ledger.keep, inputs))
        self._made: Kept | None = None

    @property
    def tensor(self) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._ledger.keep(self._module(*(kept.tensor for kept in self._inputs)))
        return self._made.tensor


class Lean:
    """One recompute of a chunk."""

    def __init__(self, chunk: Chunk, modules: Mapping[Part, nn.Module], ledger: Ledger, queue: WeightQueue) -> None:
        """`queue`: of the chunk's linear layers."""
        self._chunk, self._modules, self._ledger, self._queue = chunk, modules, ledger, queue
        self._cheap: dict[Value, MadeAgain] = {}

    def in_place(self, place: int) -> bool:
        """Whether the gradients of what the part at this place reads may take its places."""
        reads = self._chunk.parts[place].reads
        makers = (part for part in self._chunk.parts if not set(part.makes).isdisjoint(reads))
        return self._chunk.in_place(place) and all(self._lets_go(part) for part in makers)

    @contextmanager
    def keeping(self, place: int, live: Live) -> Iterator[None]:
        """Within it the part at this place runs, and its graph keeps no more than it must. `live` holds what it reads."""
        part = self._chunk.parts[place]
        if part.about.cheap and type(self._modules[part]) in NORMS:
            self._cheap[part.makes[0]] = MadeAgain(self._ledger, self._modules[part], live.read(part.reads))
        values = self._chunk.made_again(place) if self._lets_go(part) else ()
        again = {live[value].data_ptr(): self._cheap.pop(value) for value in values if value in self._cheap}
        if again:  # its linear layers read it, and nothing else here does
            self._queue.save = lambda tensor: again.get(tensor.data_ptr()) or self._ledger.keep(tensor)
        try:
            yield
        finally:
            self._queue.save = self._queue.keep

    def _lets_go(self, part: Part) -> bool:
        module = self._modules[part]
        return type(module) is QKV and module.keeps_no_result
