"""Slices: parameters that are some rows of a larger one, and say so by name.

    embed.tokens.weight[1000:2000/4000]      rows 1000 to 1999 of embed.tokens.weight, which has 4000

A shard of the vocabulary has such slices. Files, initial values and what is frozen know the larger one alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SLICE = re.compile(r"(.+)\[(\d+):(\d+)/(\d+)\](.*)")


class Slice(NamedTuple):
    """Rows `start` to `stop` - 1 of a parameter that has `rows`."""

    name: str
    """Of the larger parameter."""
    start: int
    stop: int
    rows: int

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}/{self.rows}]"


def rows_of(shard: int, shards: int, rows: int) -> range:
    """Those of one shard, as even as can be."""
    return range(shard * rows // shards, (shard + 1) * rows // shards)


def sliced(name: str, shard: int, shards: int, rows: int) -> str:
    """The name of a shard's slice of a parameter; the parameter's own where there is one shard."""
    mine = rows_of(shard, shards, rows)
    return name if shards == 1 else str(Slice(name, mine.start, mine.stop, rows))


def slice_of(name: str) -> Slice | None:
    """What the name of a parameter, or of something of its size with more behind it, says; None of one that is whole."""
    match = _SLICE.fullmatch(name) if "[" in name else None
    return Slice(match[1] + match[5], int(match[2]), int(match[3]), int(match[4])) if match else None


def whole_name(name: str) -> str:
    """The parameter that one is a slice of, or its own name."""
    found = slice_of(name)
    return name if found is None else found.name
