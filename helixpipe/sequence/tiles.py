"""Tiles: attention between the tokens of two ranks, cut into kernel calls without a mask or causal and square.

A rank's tokens are runs of positions at one stride. Of a run of queries and a run of keys in one document,
query i sees key j where j <= i + offset. That is at most three tiles, here with an offset of 2:

              keys
             f f c .      f  full: the keys that every row sees
    queries  f f c c      c  causal and square
             f f g g      g  full: rows below the square

Fused kernels align a causal mask top left or bottom right, by version; on a square both are the same. What is
masked for a whole tile is not a tile, so nothing is computed in vain and no kernel sees an empty row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Run:
    """`count` tokens at positions start, start + stride, ... of the whole sequence."""

    start: int
    stride: int
    count: int


@dataclass(frozen=True)
class Span:
    """Tokens of one document, positions start..stop-1."""

    start: int
    stop: int
    document: int


@dataclass(frozen=True)
class Tile:
    """One kernel call: local tokens q_start..q_stop-1 against the block's keys k_start..k_stop-1."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool

    @property
    def queries(self) -> slice:
        return slice(self.q_start, self.q_stop)

    @property
    def keys(self) -> slice:
        return slice(self.k_start, self.k_stop)


@dataclass(frozen=True)
class _Piece:
    """A run's tokens that lie in one document: local index, count, first position."""

    local: int
    count: int
    position: int
    document: int


def tiles(
    queries: tuple[Run, ...], keys: tuple[Run, ...], causal: bool, spans: tuple[Span, ...] | None = None
) -> list[Tile]:
    """Every (query, key) that may attend is in exactly one tile. Runs rise; all have one stride.

    `spans` cover the whole sequence; None is one document.
    """
    own = queries == keys
    stride = queries[0].stride
    q_pieces, k_pieces = _pieces(queries, spans), _pieces(keys, spans)
    if own or not causal:
        # a rank's tokens rise, so among themselves their local order is causal; and without causality none matters
        q_pieces, k_pieces, stride = _joined_pieces(q_pieces), _joined_pieces(k_pieces), 1
    by_document = defaultdict(list)
    for piece in k_pieces:
        by_document[piece.document].append(piece)
    found: list[Tile] = []
    for document, mine in _grouped(q_pieces).items():
        pairs = [(q, k) for q in mine for k in by_document[document]]
        if causal:
            found += _joined(tile for q, k in pairs for tile in _causal(q, k, stride))
        else:
            found += [_tile(q, 0, q.count, k, 0, k.count) for q, k in pairs]
    return found


def _pieces(runs: tuple[Run, ...], spans: tuple[Span, ...] | None) -> list[_Piece]:
    found, local = [], 0
    for run in runs:
        if spans is None:
            found.append(_Piece(local, run.count, run.start, 0))
        for span in spans or ():
            first = min(max(0, -((run.start - span.start) // run.stride)), run.count)  # the first at or after the start
            last = min(max(0, -((run.start - span.stop) // run.stride)), run.count)
            if first < last:
                found.append(_Piece(local + first, last - first, run.start + first * run.stride, span.document))
        local += run.count
    return found


def _joined_pieces(pieces: list[_Piece]) -> list[_Piece]:
    """Neighbours of one document as one piece whose positions are local indices."""
    found: list[_Piece] = []
    for piece in pieces:
        if found and found[-1].document == piece.document:
            found[-1] = replace(found[-1], count=found[-1].count + piece.count)
        else:
            found.append(replace(piece, position=piece.local))
    return found


def _grouped(pieces: list[_Piece]) -> dict[int, list[_Piece]]:
    groups = defaultdict(list)
    for piece in pieces:
        groups[piece.document].append(piece)
    return groups


def _causal(q: _Piece, k: _Piece, stride: int) -> Iterator[Tile]:
    offset = (q.position - k.position) // stride
    seen = max(0, -offset)  # the first query that sees a key
    if seen >= q.count:
        return
    if offset >= k.count - 1:
        yield _tile(q, 0, q.count, k, 0, k.count)
        return
    prefix = max(0, offset)
    square = min(q.count - seen, k.count - prefix)
    if prefix:
        yield _tile(q, seen, q.count, k, 0, prefix)
    yield _tile(q, seen, seen + square, k, prefix, prefix + square, causal=True)
    if seen + square < q.count:
        yield _tile(q, seen + square, q.count, k, prefix, prefix + square)


def _tile(q: _Piece, q0: int, q1: int, k: _Piece, k0: int, k1: int, causal: bool = False) -> Tile:
    return Tile(q.local + q0, q.local + q1, k.local + k0, k.local + k1, causal)


def _joined(tiles: Iterable[Tile]) -> list[Tile]:
    """Full tiles side by side or one above the other as one: fewer and larger kernel calls."""
    found: list[Tile] = []
    for tile in tiles:
        for i, other in enumerate(found):
            if tile.causal or other.causal:
                continue
            if tile.keys == other.keys and tile.q_start == other.q_stop:
                found[i] = replace(other, q_stop=tile.q_stop)
                break
            if tile.queries == other.queries and tile.k_start == other.k_stop:
                found[i] = replace(other, k_stop=tile.k_stop)
                break
        else:
            found.append(tile)
    return found
