"""What steps read: every row once an epoch, sources by weight, rows of a step that cost the same."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from processes import printed

import helixpipe as hp
from helixpipe.parts.work import Batch, Work
from helixpipe.train.balance import LengthWork, dealt
from helixpipe.train.packing import Packs
from helixpipe.train.reading import Reading
from helixpipe.train.rows import Row
from helixpipe.train.usage import Usage
from helixpipe.train.windows import Windows

LENGTH = 2048
SHAPE = hp.named_shape("tiny")
WORK = LengthWork(SHAPE)


def long_tailed(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths of documents: most are short, some fill sequences."""
    return np.minimum(40 * (1 + np.random.default_rng(seed).pareto(1.0, count)), 50_000).astype(np.int64)


def packs(count: int = 4000, seed: int = 0) -> Packs:
    return Packs(np.cumsum(long_tailed(count, seed)), LENGTH)


def key(row: Row) -> tuple[int, int]:
    """A row by its first document: no other row has it."""
    return row.source, int(row.starts[0])


def balanced(look_ahead: int = 8, **changes: int) -> Reading:
    reading = Reading((packs(),), (1.0,), LENGTH, 8, look_ahead=look_ahead, work=WORK)
    return dataclasses.replace(reading, **changes)


@pytest.mark.parametrize("look_ahead", [0, 3])
def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(look_ahead: int) -> None:
    layout = packs(300)
    for seed in range(2):
        reading = Reading((layout,), (1.0,), LENGTH, 1, seed=seed, look_ahead=look_ahead, work=WORK)
        steps = len(layout) - len(layout) % 3
        rows = [key(reading.step(step)[0]) for step in range(1, 2 * len(layout) + 7)]
        if look_ahead:  # what is dealt at an epoch's end is of both
            assert Counter(rows[: 2 * len(layout) // 3 * 3]).most_common(1)[0][1] <= 2
            assert len(set(rows[:steps])) == steps
            continue
        first, second = rows[: len(layout)], rows[len(layout) : 2 * len(layout)]
        everything = {key(layout.row(number, 0)) for number in range(len(layout))}
        assert set(first) == set(second) == everything
        assert first != second
    other = Reading((layout,), (1.0,), LENGTH, 1, seed=7)
    assert [key(other.step(step)[0]) for step in range(1, len(layout))] != rows[: len(layout) - 1]


def test_windows_of_an_epoch_begin_elsewhere_in_the_next() -> None:
    reading = Reading((Windows(1000, 50),), (1.0,), 50, 1)
    phases = [{int(reading.step(step)[0].starts[0] % 50) for step in range(19 * e + 1, 19 * e + 20)} for e in range(3)]
    assert phases[0] != phases[1] != phases[2]


def same_rows(one: list[Row], other: list[Row]) -> bool:
    return all(
        (a.starts.tolist(), a.counts.tolist(), a.documents) == (b.starts.tolist(), b.counts.tolist(), b.documents)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("look_ahead", [0, 4])
def test_a_step_is_the_same_whatever_was_read_before(look_ahead: int) -> None:
    going = balanced(look_ahead)
    steps = [going.step(step) for step in range(1, 20)]
    for step in (19, 2, 7, 11):
        assert same_rows(balanced(look_ahead).step(step), steps[step - 1])
    with pytest.raises(ValueError, match="training begins with step 1"):
        going.step(0)


@pytest.mark.parametrize("look_ahead", [0, 4])
def test_any_layout_of_as_many_sequences_has_the_same_rows(look_ahead: int) -> None:
    for step in (1, 6):
        wanted = [key(row) for row in balanced(look_ahead).step(step)]
        for layout in ((4, 2, 1), (2, 2, 2), (1, 8, 1), (2, 1, 4)):
            names = dict(zip(("microbatches", "microbatch_size", "replicas"), layout, strict=True))
            found = [key(row) for row in balanced(look_ahead, **names).step(step)]
            assert sorted(found) == sorted(wanted)


def test_micro_batches_are_light_first_and_last() -> None:
    """Of each replica: up to the dearest, then down, and none is torn."""
    for look_ahead, size in ((0, 1), (0, 2), (4, 2)):
        reading = balanced(look_ahead, microbatches=5, microbatch_size=size, replicas=2)
        for step in (1, 2, 9):
            rows = reading.step(step)
            work = [sum(work_of(row.documents) for row in rows[at : at + size]) for at in range(0, len(rows), size)]
            for mine in (work[:5], work[5:]):
                assert mine == sorted(mine)[::2] + sorted(mine)[1::2][::-1]
    one = reading.layouts[0]
    plain = Reading((one,), (1.0,), LENGTH, 5)  # attention goes across documents: all cost the same
    assert [key(row) for row in plain.step(1)] == [key(plain._row(at)) for at in range(5)]


def test_shares_of_sources_follow_the_weights_and_each_has_its_own_epochs() -> None:
    sizes, weights = (2000, 100, 300), (5.0, 3.0, 2.0)
    layouts = tuple(packs(size, seed=size) for size in sizes)
    for look_ahead in (0, 4):
        reading = Reading(layouts, weights, LENGTH, 5, look_ahead=look_ahead, work=WORK)
        rows = [row for step in range(1, 41) for row in reading.step(step)]
        counts = Counter(row.source for row in rows)
        assert [counts[source] for source in range(3)] == pytest.approx([100, 60, 40], abs=2)
        told = reading.epochs(40)
        assert told == pytest.approx([counts[source] / len(layouts[source]) for source in range(3)])
        for source, layout in enumerate(layouts):
            often = Counter(key(row) for row in rows if row.source == source)
            epochs = counts[source] / len(layout)
            assert all(int(epochs) <= times <= int(epochs) + 1 for times in often.values())


def work_of(documents: tuple[int, ...]) -> float:
    """By the formula: matrices by token, causal attention by half of the square; a backward is 2 and 2.5 forwards."""
    h, q, kv, ffn = SHAPE.hidden, SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim, SHAPE.ffn
    matrices = 2 * (h * (q + 2 * kv) + q * h + 2 * h * ffn)
    return SHAPE.layers * sum(3 * matrices * n + 3.5 * 4 * q * n * n / 2 for n in documents)


def imbalance(rows: list[Row], size: int) -> float:
    work = [sum(work_of(row.documents) for row in rows[at : at + size]) for at in range(0, len(rows), size)]
    return max(work) / (sum(work) / len(work))


def test_work_is_linear_and_square_in_a_document_s_length() -> None:
    lengths = np.array([1, 7, 7, 2048, 300])
    assert WORK.of(lengths).tolist() == pytest.approx([work_of((int(n),)) for n in lengths])


def test_work_of_windows_is_what_they_show() -> None:
    shape = hp.named_shape("tiny", window=64, window_pattern=(True, False))
    work = LengthWork(shape)
    batch = Work(shape, Batch(1, (500,)))
    wanted = sum(
        shape.about(part).forward_flops(part, batch) + shape.about(part).backward_flops(part, batch)
        for part in shape.chain()
        if str(part) not in ("embed", f"head.{shape.layers}")
    )
    assert work.of(np.array([500])).tolist() == pytest.approx([wanted])
    assert wanted < work_of((500,))


@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_balanced_rows_of_a_step_cost_the_same_and_plain_ones_do_not(size: int, replicas: int) -> None:
    found = {}
    for look_ahead in (0, 16):
        reading = balanced(look_ahead, microbatches=8 // size // replicas, microbatch_size=size, replicas=replicas)
        steps = [reading.step(step) for step in range(1, 33)]
        found[look_ahead] = [imbalance(rows, size) for rows in steps]
        assert [reading.imbalance(rows) for rows in steps] == pytest.approx(found[look_ahead])
        if replicas > 1 and look_ahead:
            halves = [imbalance(rows, len(rows) // replicas) for rows in steps]
            assert np.mean(halves) < 1.02
    assert np.mean(found[16]) < 1.04, found[16]
    assert np.mean(found[0]) - 1 > 4 * (np.mean(found[16]) - 1)


def test_rows_stay_within_the_look_ahead() -> None:
    plain, dealt_ones = balanced(0), balanced(5)
    at = {key(row): step for step in range(1, 21) for row in plain.step(step)}
    moved = 0
    for step in range(1, 21):
        for row in dealt_ones.step(step):
            assert abs(at[key(row)] - step) < 5
            moved += at[key(row)] != step
    assert moved > 40


def test_rows_are_dealt_to_groups_of_one_size() -> None:
    work = np.array([9.0, 1, 1, 9, 5, 5])
    groups = dealt(work, 3)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert [work[group].sum() for group in groups] == [10, 10, 10]


def test_what_was_read_adds_up() -> None:
    reading = balanced(0)
    used = Usage()
    rows = [reading.step(step) for step in (1, 2, 3)]
    for each in rows:
        used += reading.used(each)
    assert (used.steps, used.sequences) == (3, 24)
    assert used.tokens == sum(int(row.counts.sum()) for each in rows for row in each)
    assert used.tokens + used.padding == 24 * LENGTH
    assert used.imbalance == pytest.approx(np.mean([imbalance(each, 1) for each in rows]))
    assert used.imbalance_most == pytest.approx(max(imbalance(each, 1) for each in rows))
    table = used.table((("a", 1.5), ("b", 0.25)))
    assert Usage.from_table(table) == used
    assert table["epochs"] == [{"source": "a", "epochs": 1.5}, {"source": "b", "epochs": 0.25}]
    assert Usage.from_table({}) == Usage()
    assert Usage(2, 8, 900, 100, 2.5, 1.4).told((("'a'", 1.5), ("'b'", 0.25))) == (
        "read 8 sequences, 900 tokens, padding 10.00%, dearest micro-batch 1.250 of the mean, 1.400 at most: "
        "1.5 epochs of 'a', 0.25 epochs of 'b'"
    )


def test_windows_of_continuous_text_all_cost_the_same() -> None:
    reading = Reading((Windows(1000, 50),), (1.0,), 50, 4)
    assert reading.imbalance(reading.step(1)) == 1.0
    assert reading.documents(1) == ()


def test_every_process_reads_the_same_documents() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/train'); import test_reading as t;"
        "print([t.balanced(4).documents(step) for step in (1, 9)])"
    )
    assert printed(code) == {f"{[balanced(4).documents(step) for step in (1, 9)]}\n"}
