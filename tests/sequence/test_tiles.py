"""Tiles against the mask itself: every pair that may attend, exactly once, over all ranks together."""

from __future__ import annotations

import itertools

import pytest

from helixpipe.sequence.layout import KINDS, Layout
from helixpipe.sequence.tiles import Span, Tile, tiles

DOCUMENTS: dict[str, tuple[Span, ...] | None] = {
    "one": None,
    "boundaries": (Span(0, 3, 0), Span(3, 4, 1), Span(4, 17, 2), Span(17, 24, 3)),
    "of one token": tuple(Span(i, i + 1, i) for i in range(24)),
    "interrupted": (Span(0, 7, 5), Span(7, 12, 9), Span(12, 24, 5)),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_mask(kind: str, ranks: int, causal: bool, documents: str) -> None:
    layout, spans = Layout(kind, 24, ranks), DOCUMENTS[documents]
    document = [0] * 24 if spans is None else [s.document for s in spans for _ in range(s.stop - s.start)]
    seen: list[tuple[int, int]] = []
    for rank, source in itertools.product(range(ranks), repeat=2):
        rows, columns = layout.positions(rank).tolist(), layout.positions(source).tolist()
        for tile in tiles(layout.runs(rank), layout.runs(source), causal, spans):
            height, width = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
            assert height > 0
            assert width > 0  # kernels crash on no keys
            assert height == width or not tile.causal  # the same however a kernel aligns it
            for i, j in itertools.product(range(height), range(width)):
                if j <= i or not tile.causal:
                    seen.append((rows[tile.q_start + i], columns[tile.k_start + j]))
    may = {
        (i, j)
        for i, j in itertools.product(range(24), repeat=2)
        if document[i] == document[j] and (j <= i or not causal)
    }
    assert len(seen) == len(may)
    assert set(seen) == may


def drawn(kind: str, rank: int, source: int, causal: bool = True) -> list[tuple[int, int, int, int, bool]]:
    layout = Layout(kind, 16, 2)
    found = tiles(layout.runs(rank), layout.runs(source), causal)
    return [(t.q_start, t.q_stop, t.k_start, t.k_stop, t.causal) for t in found]


def test_a_block_is_one_kernel_call() -> None:
    for kind in KINDS:
        for rank in (0, 1):
            assert drawn(kind, rank, rank) == [(0, 8, 0, 8, True)]  # one's own block, though zigzag has two chunks
            assert drawn(kind, rank, 1 - rank, causal=False) == [(0, 8, 0, 8, False)]
    assert drawn("plain", 0, 1) == []
    assert drawn("plain", 1, 0) == [(0, 8, 0, 8, False)]
    assert drawn("zigzag", 0, 1) == [(4, 8, 0, 8, False)]  # the later chunk sees all of it
    assert drawn("zigzag", 1, 0) == [(0, 8, 0, 4, False)]  # both chunks see the first of its two
    assert drawn("striped", 0, 1) == [(1, 8, 0, 7, True)]  # strictly below the diagonal: shifted by one token
    assert drawn("striped", 1, 0) == [(0, 8, 0, 8, True)]


@pytest.mark.parametrize("kind", ["zigzag", "striped"])
def test_every_rank_has_the_same_work(kind: str) -> None:
    ranks, length = 4, 64
    layout = Layout(kind, length, ranks)

    def work(tile: Tile) -> int:
        n, m = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
        return n * (n + 1) // 2 if tile.causal else n * m

    each = [
        sum(work(t) for source in range(ranks) for t in tiles(layout.runs(rank), layout.runs(source), True))
        for rank in range(ranks)
    ]
    assert sum(each) == length * (length + 1) // 2
    assert max(each) - min(each) <= (0 if kind == "zigzag" else length)
