"""Joint calls: tiles that share no query and no key, in one kernel call of variable lengths. For accelerators, which pay for launches.

    tiles of a packed row           calls
      a . . . . .                     1   aa bb cc    every document's square
      a a . . . .
      . . b . . .                   a window, or keys of earlier segments, put a query into several tiles:
      . . b b . .                   each of them stands in a call of its own, and outputs are merged by log-sum-exp
      . . . . c .
      . . . . c c

A call names its rows by where they are in the batch, so that reversed tiles are rows in reversed order and need nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from helixpipe.model.tiles import Tile

Placed = tuple[int, Tile]
"""A sequence of the batch, and a tile of it."""
Rows = tuple[Tensor, slice, Tensor]
"""Sequence and token of each row, int64 [n], as an index of [b, heads, s, d] that gives [n, heads, d]."""


@dataclass(frozen=True)
class Joint:
    """One kernel call."""

    queries: Rows
    keys: Rows
    query_ends: Tensor
    """Of each tile the first row and, at last, the end: int32 [tiles + 1]."""
    key_ends: Tensor
    most_queries: int
    most_keys: int
    causal: bool


@dataclass
class _Group:
    """Tiles of a call, as far as they are known: of each sequence every one begins where the others have ended."""

    causal: bool
    tiles: list[Placed] = field(default_factory=list)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each sequence, the first query and the first key that are free."""

    def takes(self, sequence: int, tile: Tile) -> bool:
        query, key = self.ends.get(sequence, (0, 0))
        alone = tile.q_stop - tile.q_start == tile.k_stop - tile.k_start == 1  # a mask hides nothing
        return (alone or tile.causal == self.causal) and tile.q_start >= query and tile.k_start >= key

    def add(self, sequence: int, tile: Tile) -> None:
        self.tiles.append((sequence, tile))
        self.ends[sequence] = tile.q_stop, tile.k_stop


def joint(shares: Iterable[tuple[slice, Tile]], sequences: int, device: torch.device) -> Sequence[Joint]:
    """The calls that make up tiles of some sequences of a batch, found once for all layers."""
    placed = tuple((at, tile) for batch, tile in shares for at in range(*batch.indices(sequences)))
    return _joint(placed, device)


@lru_cache(maxsize=256)
def _joint(placed: tuple[Placed, ...], device: torch.device) -> Sequence[Joint]:
    groups: list[_Group] = []
    for sequence, tile in placed:
        group = next((each for each in groups if each.takes(sequence, tile)), None)
        if group is None:
            groups.append(group := _Group(tile.causal))
        group.add(sequence, tile)
    return [_call(group, device) for group in groups]


def _call(group: _Group, device: torch.device) -> Joint:
    sequences = [sequence for sequence, _ in group.tiles]
    queries, query_ends, most_queries = _rows(
        sequences, [_tokens(t.queries, t.flipped) for _, t in group.tiles], device
    )
    keys, key_ends, most_keys = _rows(sequences, [_tokens(t.keys, t.flipped) for _, t in group.tiles], device)
    return Joint(queries, keys, query_ends, key_ends, most_queries, most_keys, group.causal)


def _rows(sequences: list[int], tokens: list[range], device: torch.device) -> tuple[Rows, Tensor, int]:
    lengths = [len(each) for each in tokens]
    sequence = torch.tensor(sequences).repeat_interleave(torch.tensor(lengths))
    token = torch.cat([torch.arange(each.start, each.stop, each.step) for each in tokens])
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return (sequence.to(device), slice(None), token.to(device)), ends.to(device), max(lengths)


def _tokens(run: slice, flipped: bool) -> range:
    tokens = range(run.start, run.stop)
    return tokens[::-1] if flipped else tokens
