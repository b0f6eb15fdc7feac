"""Tiles against the mask itself: every pair that may attend, exactly once, over all ranks together."""

from __future__ import annotations

import itertools

import pytest

from helixpipe.model import tiles as tiles_module
from helixpipe.model.tiles import Run, Span, Tile, tiles
from helixpipe.sequence.layout import KINDS, Layout

DOCUMENTS: dict[str, tuple[Span, ...] | None] = {
    "one": None,
    "boundaries": (Span(0, 3, 0), Span(3, 4, 1), Span(4, 17, 2), Span(17, 24, 3)),
    "of one token": tuple(Span(i, i + 1, i) for i in range(24)),
    "interrupted": (Span(0, 7, 5), Span(7, 12, 9), Span(12, 24, 5)),
}


def seen_by(layout: Layout, causal: bool, spans: tuple[Span, ...] | None, window: int) -> list[tuple[int, int]]:
    """(query, key), by position, of all tiles of all ranks."""
    seen: list[tuple[int, int]] = []
    for rank, source in itertools.product(range(layout.ranks), repeat=2):
        rows, columns = layout.positions(rank).tolist(), layout.positions(source).tolist()
        for tile in tiles(layout.runs(rank), layout.runs(source), causal, spans, window):
            height, width = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
            assert height > 0
            assert width > 0  # kernels crash on no keys
            assert height == width or not tile.causal  # the same however a kernel aligns it
            assert tile.causal or not tile.flipped
            for i, j in itertools.product(range(height), range(width)):
                if not tile.causal or (j >= i if tile.flipped else j <= i):
                    seen.append((rows[tile.q_start + i], columns[tile.k_start + j]))
    return seen


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_mask(kind: str, ranks: int, causal: bool, documents: str) -> None:
    layout, spans = Layout(kind, 24, ranks), DOCUMENTS[documents]
    document = [0] * 24 if spans is None else [s.document for s in spans for _ in range(s.stop - s.start)]
    for window in (0, 1, 2, 3, 5, 8, 12, 23, 24, 40):
        seen = seen_by(layout, causal, spans, window)
        may = {
            (i, j)
            for i, j in itertools.product(range(24), repeat=2)
            if document[i] == document[j] and (j <= i or not causal) and (not window or abs(i - j) < window)
        }
        assert len(seen) == len(may), window
        assert set(seen) == may, window


def test_a_window_is_the_drawing() -> None:
    """Of the file: a window of 4 over 8 tokens."""
    drawing = tiles_module.__doc__.split("reversed order:\n\n")[1].split("\n\n")[0]
    rows = [line.replace("queries", " " * 7)[13:] for line in drawing.splitlines()]
    drawn = [["."] * 8 for _ in range(8)]
    for tile in tiles((Run(0, 1, 8),), (Run(0, 1, 8),), True, window=4):
        for i, j in itertools.product(range(tile.q_start, tile.q_stop), range(tile.k_start, tile.k_stop)):
            row, column = i - tile.q_start, j - tile.k_start
            if tile.causal and (column >= row if tile.flipped else column <= row):
                drawn[i][j] = "r" if tile.flipped else "c"
    assert [" ".join(row).replace(".", " ").rstrip() for row in drawn] == rows


def test_a_band_takes_two_kernel_calls_for_as_many_rows_as_it_is_wide() -> None:
    """So what kernels compute is what the window shows."""
    for causal, wide in ((True, 16), (False, 31)):
        found = tiles((Run(0, 1, 1600),), (Run(0, 1, 1600),), causal, window=16)
        assert len(found) <= 2 * (-(-1600 // wide) + 2)
        area = sum((t.q_stop - t.q_start) * (t.q_stop - t.q_start + 1) // 2 for t in found if t.causal)
        area += sum((t.q_stop - t.q_start) * (t.k_stop - t.k_start) for t in found if not t.causal)
        assert area == sum(
            abs(i - j) < 16 and (j <= i or not causal)
            for i in range(1600)
            for j in range(i - 16, i + 17)
            if 0 <= j < 1600
        )


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
