"""Packing: whole documents put together in rows, from their lengths alone."""

from __future__ import annotations

import bisect
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from helixpipe.train.order import Permutation
from helixpipe.train.rows import Row, padding

Longest = Literal["cut", "drop"]


class Packs:
    """Documents of a run of tokens in rows of `length` positions; each document stands in one row, or is cut over several.

    `ends`: where documents end in the run, int64, ascending. A document of n tokens has n - 1 positions. One that is longer
    than a row is cut into whole rows and a rest, or dropped. The same rows every epoch: what changes is their order.
    """

    def __init__(
        self, ends: NDArray[np.int64], length: int, longest: Longest = "cut", masked: bool = True, seed: int = 0
    ) -> None:
        self.length, self.masked = length, masked
        begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        positions = np.maximum(ends - begins - 1, 0)
        self.documents = len(ends)
        self.empty = int((positions == 0).sum())
        """Documents of one token or none: nothing can be asked of them."""
        long = positions > length
        self.cut, self.dropped = (int(long.sum()), 0) if longest == "cut" else (0, int(long.sum()))
        kept = (positions > 0) & (~long | (longest == "cut"))
        starts, counts = _cut(begins[kept], positions[kept], length)
        order = Permutation(max(len(starts), 1), seed)(np.arange(len(starts)))
        rows = best_fit(counts[order], length)
        by_row = _ascending(rows)
        self.starts, self.counts = starts[order[by_row]], counts[order[by_row]]
        self.begins = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=0))]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def padding_share(self) -> float:
        """Of all positions of an epoch."""
        return 1 - int(self.counts.sum()) / max(len(self) * self.length, 1)

    def told(self) -> str:
        kept = self.documents - self.empty - self.dropped
        words = [f"{kept:,} documents in {len(self):,} sequences of {self.length:,} tokens an epoch"]
        words.append(f"padding {self.padding_share:.2%}")
        words += [f"{self.cut:,} longer ones cut"] if self.cut else []
        words += [f"{self.dropped:,} longer ones dropped"] if self.dropped else []
        words += [f"{self.empty:,} of a single token left out"] if self.empty else []
        return ", ".join(words)

    def row(self, number: int, source: int, draw: int = 0) -> Row:
        pieces = slice(self.begins[number], self.begins[number + 1])
        counts = self.counts[pieces]
        documents = (*counts.tolist(), *padding(self.length - int(counts.sum()))) if self.masked else ()
        return Row(source, self.starts[pieces], counts, documents, np.zeros(0, np.int64))

    def spread(self, count: int, source: int) -> list[Row]:
        room = len(self) - 1
        return [self.row(room * i // max(count - 1, 1), source) for i in range(count)]


def _cut(
    begins: NDArray[np.int64], positions: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the pieces of documents begin, none longer than a row, and their positions."""
    pieces = -(-positions // length)
    which = np.repeat(np.arange(len(begins)), pieces)
    before = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
    return begins[which] + before, np.minimum(positions[which] - before, length)


def best_fit(counts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """A row for each piece: the longest pieces first, each into the row where least room is left that has enough.

    Pieces of one length go together, into as many rows with the same room as there are, so that time grows with the number of
    lengths and not with that of pieces.
    """
    found = np.zeros(len(counts), np.int64)
    if not len(counts):
        return found
    order = _ascending(length - counts)
    descending = counts[order]
    firsts = np.flatnonzero(np.diff(descending, prepend=-1))
    sizes, stops = descending[firsts], np.append(firsts, len(counts))[1:]
    rooms: list[int] = []  # ascending
    waiting: dict[int, NDArray[np.int64]] = {}  # room -> rows that have it
    rows = 0
    for size, first, stop in zip(sizes.tolist(), firsts.tolist(), stops.tolist(), strict=True):
        while first < stop:
            at = bisect.bisect_left(rooms, size)
            room = rooms[at] if at < len(rooms) else length
            each = room // size
            needed = -(-(stop - first) // each)
            if at < len(rooms):
                taken, waiting[room] = waiting[room][:needed], waiting[room][needed:]
                if not len(waiting[room]):
                    del waiting[room], rooms[at]
            else:
                taken = np.arange(rows, rows + needed)
                rows += needed
            count = min(stop - first, each * len(taken))
            found[order[first : first + count]] = np.repeat(taken, each)[:count]
            full = count // each
            _give_back(taken[:full], room - each * size, rooms, waiting)
            _give_back(taken[full:], room - (count - full * each) * size, rooms, waiting)
            first += count
    return found


def _ascending(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of numbers from 0 on, equals in their own: 16 bits at a time, for which NumPy's stable sort is a radix sort."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    for bits in range(16, int(values.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((values[order] >> bits & 0xFFFF).astype(np.uint16), kind="stable")]
    return order


def _give_back(rows: NDArray[np.int64], room: int, rooms: list[int], waiting: dict[int, NDArray[np.int64]]) -> None:
    """Rows in which so much room is left."""
    if not len(rows) or not room:
        return
    if room not in waiting:
        bisect.insort(rooms, room)
    waiting[room] = np.concatenate([waiting[room], rows]) if room in waiting else rows
