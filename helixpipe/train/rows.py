"""Rows: what sequences are made of. A row has positions; each reads a token and is asked for the one that follows it.

The last token of a run, or of a document by itself, is therefore at no position: n tokens are n - 1 positions, and none is lost.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# padding is cut into documents of so many tokens, which see so little that they cost next to nothing
PADDING_TOKENS = 1024


class Row(NamedTuple):
    """One sequence: pieces of a source's run of tokens, and padding at the end where they do not fill it."""

    source: int
    starts: NDArray[np.int64]
    """Where each piece begins in the run."""
    counts: NDArray[np.int64]
    """Positions of each piece; one token more is read."""
    documents: tuple[int, ...]
    """Tokens of each document in the row, padding's pieces too; () where attention goes across them."""
    crossing: NDArray[np.int64]
    """Positions whose next token is another document's: it is no target."""


class Layout(Protocol):
    """How one source's run of tokens is cut into rows, each once an epoch."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def told(self) -> str:
        """In words, what an epoch is."""

    def row(self, number: int, source: int, draw: int) -> Row:
        """A row of an epoch. `draw`: 64 bits that are the epoch's own."""

    def spread(self, count: int, source: int) -> list[Row]:
        """So many rows, at most as many as an epoch has, spread evenly: the same ones every time."""


def padding(tokens: int) -> list[int]:
    """So many tokens of padding as documents."""
    whole, rest = divmod(tokens, PADDING_TOKENS)
    return [PADDING_TOKENS] * whole + ([rest] if rest else [])
