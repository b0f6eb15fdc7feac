"""Segments of documents: as even as their masks' pairs allow, against sums written out token by token."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest

from helixpipe.errors import ConfigError
from helixpipe.parts.part import layer_parts
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.schedule.partition import as_training, for_shape
from helixpipe.schedule.partition_documents import equal_work

SHAPE = ModelShape(layers=2, hidden=16, heads=2, ffn=64, vocabulary=50)
WINDOWS = replace(SHAPE, layers=4, window=40, window_pattern=(True, False, False))


def of_length(draw: random.Random, length: int) -> tuple[int, ...]:
    """Long-tailed documents that fill a row."""
    found: list[int] = []
    while sum(found) < length:
        found.append(min(int(draw.paretovariate(0.7)) * 3, length - sum(found)))
    return tuple(found)


def token_costs(rows: tuple[tuple[int, ...], ...], linear: float, pairs: dict[int, float]) -> list[float]:
    """Of each position, of all rows together. A token sees half of itself: kernels count causal pairs as length^2 / 2."""
    found = [0.0] * sum(rows[0])
    for lengths in rows:
        at = 0
        for length in lengths:
            for i in range(length):
                found[at] += linear + sum(pair * min(i + 0.5, window or length) for window, pair in pairs.items())
                at += 1
    return found


@pytest.mark.parametrize("seed", range(30))
def test_every_boundary_is_where_its_share_of_the_work_is_done(seed: int) -> None:
    draw = random.Random(seed)
    length, segments = draw.randint(40, 900), draw.randint(2, 8)
    rows = tuple(of_length(draw, length) for _ in range(draw.randint(1, 3)))
    linear, pairs = draw.choice((0.0, 1.0, 30.0)), draw.choice(({0: 1.0}, {20: 1.0}, {0: 0.25, 7: 0.5, 50: 0.25}))
    costs = token_costs(rows, linear, pairs)
    before = [0.0, *accumulate(costs)]
    bounds = equal_work(rows, segments, linear, pairs)
    assert len(bounds) == segments - 1
    assert bounds == sorted(bounds)
    for i, bound in enumerate(bounds, start=1):
        share = before[-1] * i / segments
        whole = min(int(bound), length - 1)
        assert before[whole] - costs[whole] - 1e-6 <= share <= before[whole + 1] + costs[whole] + 1e-6


def flops_of(shape: ModelShape, batch: Batch) -> list[float]:
    """Of each segment, the layers' forwards and backwards."""
    parts = [part for layer in range(shape.layers) for part in layer_parts(layer)]
    return [
        sum(shape.forward_flops(part, batch, s) + shape.backward_flops(part, batch, s) for part in parts)
        for s in range(len(batch.segment_lengths))
    ]


@pytest.mark.parametrize("shape", [SHAPE, WINDOWS])
@pytest.mark.parametrize("seed", range(6))
def test_the_dearest_segment_is_as_cheap_as_any_cut_makes_it(shape: ModelShape, seed: int) -> None:
    """Of three segments in steps of 8, all cuts tried; rounding may move a boundary by half a step."""
    draw = random.Random(seed)
    length, step = 160, 8
    rows = tuple(of_length(draw, length) for _ in range(2))
    least = min(
        max(flops_of(shape, Batch(2, (a, b - a, length - b), rows)))
        for a in range(step, length - step, step)
        for b in range(a + step, length, step)
    )
    cut = for_shape(shape, length, 3, step, documents=rows)
    assert all(tokens % step == 0 for tokens in cut[:-1])
    a_step = max(flops_of(shape, Batch(2, (step,) * (length // step), rows)))
    assert max(flops_of(shape, Batch(2, cut, rows))) <= least + a_step


@pytest.mark.parametrize("shape", [SHAPE, WINDOWS])
def test_rows_of_one_document_are_cut_as_without_any(shape: ModelShape) -> None:
    for length, segments in ((4096, 4), (1000, 3), (131072, 8)):
        assert as_training(shape, length, segments, documents=((length,),) * 2) == as_training(shape, length, segments)


def test_documents_of_one_length_are_cut_evenly() -> None:
    assert for_shape(SHAPE, 1024, 4, 1, documents=((64,) * 16,)) == (256,) * 4
    assert for_shape(SHAPE, 1024, 4, 128, documents=((256, 768),))[0] > 256  # the second document is dearer


def test_a_cut_of_documents_keeps_the_unit_that_a_mesh_divides() -> None:
    draw = random.Random(5)
    for _ in range(20):
        cut = as_training(SHAPE, 960, 5, unit=12, documents=(of_length(draw, 960),))
        assert sum(cut) == 960
        assert all(tokens % 12 == 0 and tokens for tokens in cut)


def test_evenness_moves_boundaries_of_documents_too() -> None:
    rows = ((900, 100, 24),)
    apart, half, even = (for_shape(SHAPE, 1024, 4, 1, evenness=e, documents=rows) for e in (0.0, 0.5, 1.0))
    assert even == (256,) * 4
    middle = [(a + e) / 2 for a, e in zip(accumulate(apart), accumulate(even), strict=True)]
    assert list(accumulate(half)) == pytest.approx(middle, abs=1)
    with pytest.raises(ConfigError, match=r"schedule\.evenness: 2; give 0"):
        for_shape(SHAPE, 1024, 4, 1, evenness=2, documents=rows)


def test_boundaries_fall_inside_documents() -> None:
    cut = for_shape(SHAPE, 4096, 4, 1, documents=((4000, 96),))
    assert all(0 < bound < 4000 for bound in list(accumulate(cut))[:-1])
    assert all(after < before for before, after in pairwise(cut[:3]))
