"""Packed: sequences that hold several documents, none of which attends to another.

    sequence 0    aaaa|bb|cccccc      each of a micro-batch may be packed in its own way: its tiles are its own, and
    sequence 1    aaaa|bb|cccccc      neighbours that have the same ones share kernel calls
    sequence 2    aaaaaaaaaaaa

Tiles are found once for all layers: they are kept by value, as many as a few micro-batches ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from helixpipe.model.merging import Share
from helixpipe.model.tiles import Run, Span, Tile, tiles
from helixpipe.parts.work import Batch, Lengths


@dataclass(frozen=True)
class Packed:
    """The documents of a micro-batch's sequences, as a segment of it sees them."""

    documents: Lengths
    """Of each sequence the lengths of its documents, tokens."""
    start: int
    """The segment's first position: runs are counted from it."""

    @staticmethod
    def of(batch: Batch, segment: int) -> Packed:
        return Packed(batch.documents, batch.start(segment))

    def shares(self, cut: Callable[[tuple[Span, ...]], Sequence[Tile]]) -> list[Share]:
        """What `cut` makes of the documents of each sequence, of neighbours together where it is the same."""
        found: list[Share] = []
        first = 0
        made = {lengths: cut(self._spans(lengths)) for lengths in set(self.documents)}
        for same, group in groupby(made[lengths] for lengths in self.documents):
            stop = first + sum(1 for _ in group)
            found += [(slice(first, stop), tile) for tile in same]
            first = stop
        return found

    def _spans(self, lengths: tuple[int, ...]) -> tuple[Span, ...]:
        found, begin = [], -self.start
        for number, length in enumerate(lengths):
            found.append(Span(begin, begin + length, number))
            begin += length
        return tuple(found)


@lru_cache(maxsize=256)
def packed_tiles(packed: Packed, queries: Run, keys: Run, causal: bool, window: int) -> list[Share]:
    """Of a run of queries and a run of keys, `model.tiles.tiles` of each sequence."""
    return packed.shares(lambda spans: tiles((queries,), (keys,), causal, spans, window))


@lru_cache(maxsize=256)
def packed_seen(batch: Batch, segment: int, window: int) -> range:
    """`Batch.seen`, found once for all layers."""
    return batch.seen(segment, window)


@lru_cache(maxsize=256)
def packed_tail(batch: Batch, segment: int, window: int) -> int:
    """`Batch.tail`, found once for all layers."""
    return batch.tail(segment, window)
