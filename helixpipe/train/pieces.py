"""Pieces of files that are read as one long run of tokens."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helixpipe.data.prepared import unpacked
from helixpipe.errors import DataError


class Piece(NamedTuple):
    """A run of tokens in one file. `mask`: the file of bits that say which of the file's tokens count, "" for all."""

    path: str
    dtype: str
    offset_bytes: int
    tokens: int
    mask: str = ""


class Tokens:
    """Pieces read as one long run."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self._ends = list(itertools.accumulate(piece.tokens for piece in self.pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from `start` on, across files; raises DataError when a file has become shorter."""
        return np.concatenate([read_piece(*part) for part in self._parts(start, count)])

    def masked(self) -> bool:
        """Whether any token does not count as a target."""
        return any(piece.mask for piece in self.pieces)

    def counted(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` tokens from `start` on count as targets."""
        return np.concatenate([_read_mask(*part) for part in self._parts(start, count)])

    def _parts(self, start: int, count: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that hold `count` tokens from `start` on, what is skipped of each and what taken."""
        for index in range(bisect.bisect_right(self._ends, start), len(self.pieces)):
            piece = self.pieces[index]
            skipped = start - (self._ends[index] - piece.tokens)
            taken = min(count, piece.tokens - skipped)
            yield piece, skipped, taken
            start, count = start + taken, count - taken
            if not count:
                return


def read_piece(piece: Piece, skipped: int, count: int) -> NDArray[np.int64]:
    """`count` tokens of a piece after so many; raises DataError when they are not there any more."""
    width = np.dtype(piece.dtype).itemsize
    try:
        found = np.fromfile(piece.path, piece.dtype, count, offset=piece.offset_bytes + skipped * width)
    except OSError as error:
        raise DataError(f"data.path: '{piece.path}' cannot be read any more: {error.strerror or error}") from None
    if len(found) < count:
        raise DataError(f"data.path: '{piece.path}' became shorter; leave the data alone while it is trained on")
    return found.astype(np.int64)


def _read_mask(piece: Piece, skipped: int, count: int) -> NDArray[np.bool_]:
    if not piece.mask:
        return np.ones(count, bool)
    start = piece.offset_bytes // np.dtype(piece.dtype).itemsize + skipped
    bits = read_piece(Piece(piece.mask, "uint8", 0, 0), start // 8, (start + count + 7) // 8 - start // 8)
    return unpacked(bits.astype(np.uint8), start % 8, count)
