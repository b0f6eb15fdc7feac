"""Rows from lengths: each position once, none too long, and documents where they are said to be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from helixpipe.train.packing import Longest, Packs, best_fit
from helixpipe.train.rows import PADDING_TOKENS, Row, padding
from helixpipe.train.windows import Windows


def ends(lengths: list[int]) -> NDArray[np.int64]:
    return np.cumsum(np.array(lengths, np.int64))


def positions(row: Row) -> list[int]:
    return [
        at
        for start, count in zip(row.starts.tolist(), row.counts.tolist(), strict=True)
        for at in range(start, start + count)
    ]


LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@given(LENGTHS, st.integers(2, 20), st.sampled_from(["cut", "drop"]), st.integers(0, 5))
def test_every_document_is_read_once_an_epoch(lengths: list[int], length: int, longest: Longest, seed: int) -> None:
    """A position is every token of a document but its last: the next token is asked for at each."""
    packs = Packs(ends(lengths), length, longest, seed=seed)
    wanted = []
    for end, tokens in zip(ends(lengths).tolist(), lengths, strict=True):
        if longest == "cut" or tokens - 1 <= length:
            wanted += range(end - tokens, end - 1)
    rows = [packs.row(number, 0) for number in range(len(packs))]
    assert sorted(at for row in rows for at in positions(row)) == wanted
    for row in rows:
        assert sum(row.documents) == length
        assert 0 < row.counts.sum() <= length
        assert row.documents[: len(row.counts)] == tuple(row.counts.tolist())
        assert not len(row.crossing)
    long = sum(tokens - 1 > length for tokens in lengths)
    assert (packs.cut, packs.dropped) == ((long, 0) if longest == "cut" else (0, long))
    assert packs.empty == sum(tokens < 2 for tokens in lengths)
    of_all = len(packs) * length
    assert packs.padding_share == pytest.approx(1 - len(wanted) / of_all if of_all else 1)


def test_a_document_stands_in_one_row_or_is_cut_into_whole_ones_and_a_rest() -> None:
    packs = Packs(ends([5, 31, 9]), 10)
    pieces = sorted(zip(packs.starts.tolist(), packs.counts.tolist(), strict=True))
    assert pieces == [(0, 4), (5, 10), (15, 10), (25, 10), (36, 8)]
    assert Packs(ends([5, 31, 9]), 10, "drop").told() == (
        "2 documents in 2 sequences of 10 tokens an epoch, padding 40.00%, 1 longer ones dropped"
    )


def test_the_seed_decides_which_documents_stand_together() -> None:
    found = [Packs(ends([4] * 40), 9, seed=seed).starts.tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def simple_best_fit(counts: list[int], length: int) -> int:
    """How many rows the rule needs, one piece at a time."""
    rooms: list[int] = []
    for count in sorted(counts, reverse=True):
        fitting = [at for at, room in enumerate(rooms) if room >= count]
        if fitting:
            rooms[min(fitting, key=lambda at: rooms[at])] -= count
        else:
            rooms.append(length - count)
    return len(rooms)


@given(st.lists(st.integers(1, 30), max_size=80))
def test_pieces_of_one_length_at_a_time_need_no_more_rows_than_one_by_one(counts: list[int]) -> None:
    rows = best_fit(np.array(counts, np.int64), 30)
    used = np.bincount(rows, weights=counts) if counts else np.zeros(0)
    assert (used <= 30).all()
    assert (used > 0).all()
    assert len(used) == simple_best_fit(counts, 30)


def test_lengths_beyond_16_bits_are_packed_too() -> None:
    rows = best_fit(np.array([70_000, 30_000, 100_000, 1, 69_999], np.int64), 100_000)
    assert rows.tolist() == [1, 1, 0, 2, 2]


def test_padding_is_cut_into_documents_that_cost_next_to_nothing() -> None:
    assert padding(0) == []
    assert padding(PADDING_TOKENS * 2 + 5) == [PADDING_TOKENS, PADDING_TOKENS, 5]
    row = Packs(ends([101]), 5000).row(0, 0)
    assert row.documents == (100, 1024, 1024, 1024, 1024, 804)
    assert Packs(ends([101]), 5000, masked=False).row(0, 0).documents == ()


@given(st.integers(3, 200), st.integers(1, 30), st.integers(0, 2**64 - 1))
def test_windows_of_an_epoch_are_disjoint_and_leave_less_than_one(tokens: int, length: int, draw: int) -> None:
    windows = Windows(tokens, length)
    assert len(windows) == (tokens - 1) // length
    found = [at for number in range(len(windows)) for at in positions(windows.row(number, 0, draw))]
    assert len(found) == len(set(found)) == len(windows) * length
    assert not found or (min(found) >= 0 and max(found) <= tokens - 2), "each has a token that follows"
    if found:
        assert found[0] == draw % (tokens - 1)


@given(st.lists(st.integers(0, 12), min_size=3, max_size=30), st.integers(2, 15), st.integers(0, 2**64 - 1))
def test_windows_with_a_mask_are_cut_at_documents(lengths: list[int], length: int, draw: int) -> None:
    total = sum(lengths)
    windows = Windows(total, length, ends(lengths))
    owner = [document for document, tokens in enumerate(lengths) for _ in range(tokens)]
    for number in range(len(windows)):
        row = windows.row(number, 0, draw)
        read = positions(row)
        assert sum(row.documents) == length
        at = 0
        for tokens in row.documents:
            run = read[at : at + tokens]
            assert len({owner[each] for each in run}) == 1
            assert run == list(range(run[0], run[0] + tokens))
            at += tokens
        crossing = [index for index, each in enumerate(read) if owner[each + 1] != owner[each]]
        assert row.crossing.tolist() == crossing
        same = [owner[one] == owner[other] and other == one + 1 for one, other in itertools.pairwise(read)]
        assert len(row.documents) == 1 + same.count(False), "and nowhere else"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_of_an_evaluation_are_spread_evenly(count: int) -> None:
    assert [row.starts.tolist() for row in Windows(101, 10).spread(count, 0)] == [
        [90 * i // max(count - 1, 1)] for i in range(count)
    ]
    packs = Packs(ends([11] * 9), 10)
    assert [row.starts.tolist() for row in packs.spread(count, 0)] == [
        packs.row(8 * i // max(count - 1, 1), 0).starts.tolist() for i in range(count)
    ]
