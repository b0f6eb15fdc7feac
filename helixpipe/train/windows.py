"""Windows: rows of continuous text, cut from a run of tokens as from a ring."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helixpipe.train.rows import Row


class Windows:
    """A run of tokens in windows of `length`. `ends`: where its documents end, if rows are to know them.

    The positions of the run, all tokens but the last, are a ring: each epoch begins at a place of its own, so that windows
    are cut elsewhere each time, and leaves out less than one window. The row that has both ends of the run is two pieces.
    """

    def __init__(self, tokens: int, length: int, ends: NDArray[np.int64] | None = None) -> None:
        self.positions, self.length, self.ends = max(tokens - 1, 0), length, ends

    def __len__(self) -> int:
        return self.positions // self.length

    def told(self) -> str:
        return f"{len(self):,} windows of {self.length:,} tokens an epoch"

    def row(self, number: int, source: int, draw: int) -> Row:
        return self.window((draw + number * self.length) % self.positions, source)

    def spread(self, count: int, source: int) -> list[Row]:
        room = self.positions - self.length
        return [self.window(room * i // max(count - 1, 1), source) for i in range(count)]

    def window(self, start: int, source: int) -> Row:
        """The window from a position on."""
        first = min(self.length, self.positions - start)
        pieces = [(start, first)] + ([(0, self.length - first)] if first < self.length else [])
        starts, counts = (np.array(each, np.int64) for each in zip(*pieces, strict=True))
        if self.ends is None:
            return Row(source, starts, counts, (), np.zeros(0, np.int64))
        borders = [self.length]
        crossing = []
        at = 0
        for start, count in pieces:
            inside = self.ends[
                np.searchsorted(self.ends, start, "right") : np.searchsorted(self.ends, start + count, "right")
            ]
            within = np.unique(inside) - start + at
            crossing += (within - 1).tolist()
            borders += within.tolist()
            at += count
            borders.append(at)
        lengths = np.diff(np.unique([0, *borders]))
        return Row(source, starts, counts, tuple(lengths.tolist()), np.array(crossing, np.int64))
