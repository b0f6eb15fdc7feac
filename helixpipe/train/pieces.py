"""Pieces of files that are read as one long run of tokens."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from helixpipe.data.prepared import unpacked
from helixpipe.errors import DataError

Scalar = TypeVar("Scalar", bound=np.generic)


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
        return self.gather([start], [count])[0]

    def gather(self, starts: Sequence[int], counts: Sequence[int]) -> list[NDArray[np.int64]]:
        """The tokens of many runs: from each start on so many. Raises DataError as `read`."""
        with _Opened() as files:
            return self._gathered(
                starts, counts, lambda piece, skipped, count: read_piece(piece, skipped, count, files)
            )

    def gather_counted(self, starts: Sequence[int], counts: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Which tokens of many runs count as targets."""
        with _Opened() as files:
            return self._gathered(
                starts, counts, lambda piece, skipped, count: _read_mask(piece, skipped, count, files)
            )

    def _gathered(
        self, starts: Sequence[int], counts: Sequence[int], read: Callable[[Piece, int, int], NDArray[Scalar]]
    ) -> list[NDArray[Scalar]]:
        """Read in the order of the files, so that each is opened once."""
        order = sorted(range(len(starts)), key=starts.__getitem__)
        found = {at: np.concatenate([read(*part) for part in self._parts(starts[at], counts[at])]) for at in order}
        return [found[at] for at in range(len(starts))]

    def masked(self) -> bool:
        """Whether any token does not count as a target."""
        return any(piece.mask for piece in self.pieces)

    def counted(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` tokens from `start` on count as targets."""
        return self.gather_counted([start], [count])[0]

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


class _Opened:
    """The file that was read last, left open: who reads many runs reads them file by file."""

    def __init__(self) -> None:
        self._path, self._descriptor = "", -1

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._path, self._descriptor = "", -1

    def read(self, path: str, dtype: str, offset: int, count: int) -> NDArray[Any]:
        """As many as there are of `count` numbers from an offset (bytes) on; raises OSError."""
        if path != self._path:
            self._close()
            self._path, self._descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        width = np.dtype(dtype).itemsize
        content = os.pread(self._descriptor, count * width, offset)
        return np.frombuffer(content[: len(content) // width * width], dtype)


def read_piece(piece: Piece, skipped: int, count: int, files: _Opened | None = None) -> NDArray[np.int64]:
    """`count` tokens of a piece after so many; raises DataError when they are not there any more."""
    if files is None:
        with _Opened() as files:
            return read_piece(piece, skipped, count, files)
    width = np.dtype(piece.dtype).itemsize
    try:
        found = files.read(piece.path, piece.dtype, piece.offset_bytes + skipped * width, count)
    except OSError as error:
        raise DataError(f"data.path: '{piece.path}' cannot be read any more: {error.strerror or error}") from None
    if len(found) < count:
        raise DataError(f"data.path: '{piece.path}' became shorter; leave the data alone while it is trained on")
    return found.astype(np.int64)


def _read_mask(piece: Piece, skipped: int, count: int, files: _Opened) -> NDArray[np.bool_]:
    if not piece.mask:
        return np.ones(count, bool)
    start = piece.offset_bytes // np.dtype(piece.dtype).itemsize + skipped
    bits = read_piece(Piece(piece.mask, "uint8", 0, 0), start // 8, (start + count + 7) // 8 - start // 8, files)
    return unpacked(bits.astype(np.uint8), start % 8, count)
