"""Segment partition: the closed form, rounding, measured costs, and what cannot be cut."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.errors import ConfigError
from helixpipe.parts.part import LAYER_KINDS, Part
from helixpipe.parts.shapes import SHAPES, named_shape
from helixpipe.parts.work import Batch
from helixpipe.schedule.partition import (
    computation_wise,
    even,
    for_shape,
    from_costs,
    pipelined,
    refuse_bidirectional,
)

some = settings(max_examples=150, deadline=None)


def costs_of(lengths: tuple[int, ...], seconds) -> list[float]:
    return [seconds(tokens, sum(lengths[:i])) for i, tokens in enumerate(lengths)]


def causal(linear: float, quadratic: float):
    return lambda length, context: linear * length + quadratic * ((context + length) ** 2 - context**2)


@given(st.integers(1, 5000), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1e-2), st.sampled_from([1, 7, 128]))
@some
def test_any_cut_sums_to_the_sequence_in_whole_multiples(
    length: int, segments: int, linear: float, quadratic: float, multiple: int
) -> None:
    cuts = [
        lambda: even(length, segments, multiple),
        lambda: computation_wise(length, segments, linear + 1e-3, quadratic, multiple),
        lambda: from_costs(length, segments, causal(linear + 1e-3, quadratic), multiple),
    ]
    for cut in cuts:
        if segments > 1 and segments * multiple > length:
            with pytest.raises(ConfigError, match=r"schedule\.segments"):
                cut()
            continue
        lengths = cut()
        assert len(lengths) == segments
        assert sum(lengths) == length
        assert all(tokens % multiple == 0 for tokens in lengths[:-1])
        assert segments == 1 or min(lengths) >= multiple


def test_even_segments() -> None:
    assert even(4096, 4) == (1024, 1024, 1024, 1024)
    assert even(10, 3, 1) == (3, 4, 3)
    assert even(1000, 3, 128) == (384, 256, 360)
    assert even(5, 1) == (5,)


@given(st.integers(64, 10**6), st.integers(1, 64), st.floats(1e-3, 1e3), st.floats(0, 1e3))
@some
def test_the_closed_form_costs_the_same_in_every_segment(
    length: int, segments: int, linear: float, quadratic: float
) -> None:
    """To within the cost of the tokens that rounding moved, one at either end."""
    lengths = computation_wise(length, segments, linear, quadratic, 1)
    seconds = causal(linear, quadratic)
    token = seconds(1, length - 1)
    share = seconds(length, 0) / segments
    if token * 2 < share:  # else a segment is a token
        assert all(abs(each - share) <= token * 1.01 for each in costs_of(lengths, seconds))
        assert all(after <= before + 1 for before, after in itertools.pairwise(lengths))


def test_the_closed_form_without_and_with_nothing_but_attention() -> None:
    assert computation_wise(4096, 4, 1, 0, 1) == (1024, 1024, 1024, 1024)
    # boundaries at L * sqrt(i/k)
    assert computation_wise(10000, 4, 0, 1, 1) == (5000, 2071, 1589, 1340)


def test_attention_80_percent_of_the_work_in_four_segments() -> None:
    """linear*L = 0.2 and quadratic*L^2 = 0.8 of the whole: boundaries solve 0.8x^2 + 0.2x = i/4."""
    lengths = computation_wise(100000, 4, 0.2 / 1e5, 0.8 / 1e10, 1)
    assert sum(lengths[:1]) == pytest.approx(44783, abs=1)
    assert costs_of(lengths, causal(0.2 / 1e5, 0.8 / 1e10)) == pytest.approx([0.25] * 4, abs=2e-5)


@pytest.mark.parametrize("name", ["7b", "llama3-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("length", [4096, 131072])
def test_segments_of_a_shape_cost_the_same_flops(name: str, recompute: str, length: int) -> None:
    shape = SHAPES[name]
    batch = Batch(1, for_shape(shape, length, 8, 1, recompute))

    def flops(segment: int) -> float:
        total = 0.0
        for part in (Part(kind, 0) for kind in LAYER_KINDS):
            forward = shape.forward_flops(part, batch, segment)
            again = recompute == "full" or (recompute == "selective" and part.kind != "attn")
            total += forward * (1 + again) + shape.backward_flops(part, batch, segment)
        return total

    assert [flops(s) for s in range(8)] == pytest.approx([flops(0)] * 8, rel=5e-3)


def test_recompute_makes_attention_a_smaller_share() -> None:
    """So its segments are more even."""
    first = [for_shape(SHAPES["7b"], 131072, 8, 128, recompute)[0] for recompute in ("none", "selective")]
    assert first[0] > first[1] > 131072 / 8


# Measured costs


def brute_force(length: int, multiple: int, segments: range):
    ends = range(multiple, length - multiple + 1, multiple)
    for k in segments:
        for cut in itertools.combinations(ends, k - 1):
            yield tuple(b - a for a, b in itertools.pairwise([0, *cut, length]))


@given(st.integers(6, 11), st.integers(1, 5), st.floats(0, 3), st.floats(0.01, 1), st.floats(0, 0.2), st.integers(0, 3))
@some
def test_measured_costs_are_cut_as_well_as_any_cut_can_be(
    blocks: int, segments: int, fixed: float, linear: float, quadratic: float, odd: int
) -> None:
    """The dearest segment is the cheapest of all cuts; `fixed` is what a kernel costs however short."""
    length = 4 * blocks + odd
    seconds = lambda n, context: fixed + causal(linear, quadratic)(n, context)  # noqa: E731
    found = max(costs_of(from_costs(length, segments, seconds, 4), seconds))
    least = min(max(costs_of(cut, seconds)) for cut in brute_force(length, 4, range(segments, segments + 1)))
    assert found == pytest.approx(least)


@given(st.integers(2, 9), st.integers(1, 9), st.floats(0, 3), st.floats(0.01, 1), st.floats(0, 0.2), st.integers(1, 3))
@some
def test_terapipe_s_cut_is_within_its_grain_of_the_best(
    blocks: int, ranks: int, fixed: float, linear: float, quadratic: float, microbatches: int
) -> None:
    seconds = lambda n, context: fixed + causal(linear, quadratic)(n, context)  # noqa: E731

    def latency(cut: tuple[int, ...]) -> float:
        each = costs_of(cut, seconds)
        return microbatches * sum(each) + (ranks - 1) * max(each)

    length = 4 * blocks
    found = latency(pipelined(length, ranks, seconds, 4, microbatches))
    least = min(latency(cut) for cut in brute_force(length, 4, range(1, blocks + 1)))
    assert least <= found + 1e-9
    assert found <= least * 1.01


def test_one_rank_keeps_the_sequence_whole_where_kernels_cost_something() -> None:
    seconds = lambda n, context: 1.0 + causal(1, 1)(n, context)  # noqa: E731
    assert pipelined(64, 1, seconds, 4) == (64,)
    assert len(pipelined(64, 8, seconds, 4)) > 4


def test_long_sequences_are_cut_in_seconds() -> None:
    """128k tokens: 1024 blocks of 128."""
    seconds = lambda n, context: 1e-3 + causal(1e-6, 1e-11)(n, context)  # noqa: E731
    start = time.monotonic()
    lengths = from_costs(131072, 16, seconds)
    assert max(costs_of(lengths, seconds)) < 1.02 * min(costs_of(lengths, seconds)) + seconds(256, 131072)
    assert sum(pipelined(32768, 8, seconds)) == 32768
    assert time.monotonic() - start < 20


# What cannot be cut


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: even(8, 9, 1), "schedule.segments: 9 segments of a sequence of 8 tokens; give at most 8"),
        (lambda: even(8, 0), "schedule.segments: 0; give at least 1 (1 keeps the sequence whole)"),
        (lambda: even(8, 2, 0), "schedule.segment_multiple: 0; give at least 1 (1 does not round)"),
        (
            lambda: computation_wise(1000, 8, 1, 1),
            "schedule.segments: 8 segments of at least 128 tokens are more than the sequence's 1000; give at most 7 "
            "segments, or a schedule.segment_multiple of at most 125",
        ),
        (
            lambda: from_costs(100, 2, causal(1, 1)),
            "schedule.segments: 2 segments of at least 128 tokens are more than the sequence's 100; give at most 1 "
            "segments, or a schedule.segment_multiple of at most 50",
        ),
        (
            lambda: computation_wise(1000, 2, 0, 0),
            "schedule.partition: linear cost 0 and quadratic cost 0; give two from 0 up, not both 0",
        ),
        (
            lambda: for_shape(named_shape("tiny", causal=False), 1024, 2),
            "schedule.segments: 2 segments need causal attention (model.causal), since the first segments run before the "
            "keys of later ones exist; use segments = 1, or the helix family, which splits no sequence",
        ),
    ],
)
def test_what_cannot_be_cut_says_what_can(call, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value) == message


def test_a_whole_sequence_may_attend_both_ways() -> None:
    refuse_bidirectional(named_shape("tiny", causal=False), 1)
    assert for_shape(named_shape("tiny", causal=False), 1000, 1) == (1000,)
