"""Tiles: attention between runs of tokens, cut into kernel calls without a mask or causal and square.

A rank's tokens are runs of positions at one stride, and so are a segment's. Of a run of queries and a run of keys in one
document, query i sees key j where j <= i + offset. That is at most three tiles, here with an offset of 2:

              keys
             f f c .      f  full: the keys that every row sees
    queries  f f c c      c  causal and square
             f f g g      g  full: rows below the square

A window also hides keys that are too far back, so what is seen is a band, and as many rows as the band is wide are cut at
a time. From the key on that the first of them sees last, a row is limited by what is too late, before it by what is
too far back. Here with a window of 4; `r` is causal and square once its queries and its keys are in reversed order:

             c
             c c
             c c c
             c c c c
    queries    r r r c
                 r r c c
                   r c c c
                     c c c c

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
    flipped: bool = False
    """Causal of the tokens in reverse: query i of the tile sees its keys from i on."""

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

    def part(self, start: int, stop: int) -> _Piece:
        return replace(self, local=self.local + start, count=stop - start)


def tiles(
    queries: tuple[Run, ...],
    keys: tuple[Run, ...],
    causal: bool,
    spans: tuple[Span, ...] | None = None,
    window: int = 0,
) -> list[Tile]:
    """Every (query, key) that may attend is in exactly one tile. Runs rise; all have one stride.

    `spans` cover the whole sequence; None is one document. `window`: how near, in positions, is near enough; 0 is any.
    """
    own = queries == keys
    stride = queries[0].stride
    q_pieces, k_pieces = _pieces(queries, spans), _pieces(keys, spans)
    if (own or not causal) and not window:
        # a rank's tokens rise, so among themselves their local order is causal; and without causality none matters
        q_pieces, k_pieces, stride = _joined_pieces(q_pieces), _joined_pieces(k_pieces), 1
    by_document = defaultdict(list)
    for piece in k_pieces:
        by_document[piece.document].append(piece)
    found: list[Tile] = []
    for document, mine in _grouped(q_pieces).items():
        pairs = [(q, k) for q in mine for k in by_document[document]]
        if window:
            found += _joined(tile for q, k in pairs for tile in _banded(q, k, stride, causal, window))
        elif causal:
            found += _joined(tile for q, k in pairs for tile in _causal(q, k, (q.position - k.position) // stride))
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


def _causal(q: _Piece, k: _Piece, offset: int) -> Iterator[Tile]:
    """Query i sees key j where j <= i + offset."""
    seen = max(0, -offset)  # the first query that sees a key
    if seen >= q.count or not k.count:
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


def _reversed_causal(q: _Piece, k: _Piece, offset: int) -> Iterator[Tile]:
    """Query i sees key j where j >= i + offset: causal when counted from the ends."""
    for tile in _causal(replace(q, local=0), replace(k, local=0), k.count - q.count - offset):
        yield Tile(
            q.local + q.count - tile.q_stop, q.local + q.count - tile.q_start,
            k.local + k.count - tile.k_stop, k.local + k.count - tile.k_start, tile.causal, flipped=tile.causal,
        )  # fmt: skip


def _banded(q: _Piece, k: _Piece, stride: int, causal: bool, window: int) -> Iterator[Tile]:
    """Query i sees key j where low <= j - i <= high."""
    apart = q.position - k.position
    low = (apart - window) // stride + 1
    high = apart // stride if causal else (apart + window - 1) // stride
    rows = high - low + 1
    if rows < 1:  # at this stride they are never near enough
        return
    last = min(q.count, k.count - low)
    for start in range(max(0, -high), last, rows):
        stop = min(start + rows, last)
        before, middle, after = (min(max(0, at), k.count) for at in (start + low, start + high, stop + high))
        mine = q.part(start, stop)
        yield from _reversed_causal(mine, k.part(before, middle), start + low - before)
        yield from _causal(mine, k.part(middle, after), start + high - middle)


def _tile(q: _Piece, q0: int, q1: int, k: _Piece, k0: int, k1: int, causal: bool = False) -> Tile:
    return Tile(q.local + q0, q.local + q1, k.local + k0, k.local + k1, causal)


def _joined(tiles: Iterable[Tile]) -> list[Tile]:
    """Full tiles side by side or one above the other as one: fewer and larger kernel calls."""
    found: list[Tile] = []
    for tile in tiles:
        if tile.causal:
            found.append(tile)
            continue
        for i, other in enumerate(found):
            if other.causal:
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
