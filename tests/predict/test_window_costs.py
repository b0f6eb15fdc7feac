"""What a window costs: pairs counted one by one, cuts of equal cost, curves, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part, layer_parts
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.window import pairs, seen, tail
from helixpipe.parts.work import Batch
from helixpipe.predict.cost import Analytic
from helixpipe.predict.curves import ATTENTION, Curve, Size, fit
from helixpipe.predict.estimate import Setting, estimate_family
from helixpipe.predict.hardware import Link, named_accelerator
from helixpipe.predict.profile import CURVES, PASSES, Profile, Timing
from helixpipe.runtime.profiling import measure
from helixpipe.schedule.partition import for_shape

SHAPE = ModelShape(layers=6, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19)
MIXED = replace(SHAPE, window=9, window_pattern=(True, True, False))


def sees(i: int, j: int, causal: bool, window: int) -> bool:
    return (j <= i or not causal) and (not window or abs(i - j) < window)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(0, 40),
    st.booleans(),
)
def test_pairs_segments_and_tails_are_those_counted_one_by_one(lengths: list[int], window: int, causal: bool) -> None:
    length, ends = sum(lengths), list(itertools.accumulate(lengths))
    places = [range(end - tokens, end) for end, tokens in zip(ends, lengths, strict=True)]
    for segment, mine in enumerate(places):
        count = sum(sees(i, j, causal, window) for i in mine for j in range(length))
        assert pairs(mine.start, mine.stop, length, causal, window) == count
        shown = [s for s in range(segment) if any(sees(i, j, True, window) for i in mine for j in places[s])]
        assert list(seen(lengths, segment, window)) == shown
        after = range(mine.stop, mine.stop + 100)  # whatever comes
        assert tail(len(mine), window) == sum(any(sees(i, j, True, window) for i in after) for j in mine)


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_the_pairs_that_each_layer_shows(causal: bool) -> None:
    shape, batch = replace(MIXED, causal=causal), Batch(3, (10, 6, 14))
    for layer, segment in itertools.product(range(6), range(3)):
        start, stop = batch.start(segment), batch.start(segment) + batch.segment_lengths[segment]
        window = 9 if layer % 3 < 2 else 0
        count: float = sum(sees(i, j, causal, window) for i in range(start, stop) for j in range(30))
        if not window and causal:
            count -= (stop - start) / 2  # the half that kernels are said to compute
        part = Part("attn", layer)
        assert shape.forward_flops(part, batch, segment) == 4 * 3 * 16 * count
        assert shape.backward_flops(part, batch, segment) == 2.5 * 4 * 3 * 16 * count
    assert shape.forward_flops(Part("block", 0), batch, 0) - shape.forward_flops(Part("block", 2), batch, 0) == (
        shape.forward_flops(Part("attn", 0), batch, 0) - shape.forward_flops(Part("attn", 2), batch, 0)
    )


def test_layers_of_different_windows_are_not_alike() -> None:
    for kind in ("norm", "qkv", "attn", "proj", "mlp", "block"):
        alike = [MIXED.alike(Part(kind, layer)) for layer in range(6)]
        assert alike[1] == alike[4]
        assert alike[2] == alike[5]
        assert (alike[1] == alike[2]) == (kind not in ("attn", "block"))
    assert MIXED.windows == (0, 9)
    assert MIXED.sorts() == {0: 4 / 6, 2: 2 / 6}
    assert SHAPE.windows == (0,)
    assert SHAPE.sorts() == {0: 1.0}


def layer_flops(shape: ModelShape, lengths: tuple[int, ...], segment: int) -> float:
    batch = Batch(1, lengths)
    parts = [part for layer in range(shape.layers) for part in layer_parts(layer)]
    return math.fsum(shape.forward_flops(p, batch, segment) + shape.backward_flops(p, batch, segment) for p in parts)


@pytest.mark.parametrize("pattern", [(), (True, True, False), (True, False)])
def test_a_cut_by_computation_counts_the_windows_of_all_layers(pattern: tuple[bool, ...]) -> None:
    """Within what a token costs; of all layers alike the first tokens alone see fewer, so the cut is nearly even."""
    shape = replace(SHAPE, window=64, window_pattern=pattern)
    lengths = for_shape(shape, 4096, 4, multiple=1)
    costs = [layer_flops(shape, lengths, segment) for segment in range(4)]
    assert max(costs) / min(costs) < 1.005
    full = for_shape(replace(shape, window=0, window_pattern=()), 4096, 4, multiple=1)
    even = 1024
    assert max(lengths) < max(full)
    assert (max(lengths) < 1.03 * even) == (not pattern)


def test_a_step_with_windows_takes_less_and_more_than_none_at_all() -> None:
    def step_s(shape: ModelShape) -> float:
        return estimate_family(Setting(shape, 4096), "seq1f1b", 2, 4, segments=4).step_s

    local = replace(SHAPE, window=64)
    full, mixed, windowed = map(step_s, (SHAPE, replace(local, window_pattern=(True, True, False)), local))
    assert windowed < 0.6 * full
    assert 0.95 < (mixed - windowed) / (full - windowed) * 3 < 1.15  # a layer in three sees all


def test_a_ring_of_segments_passes_what_a_window_reaches() -> None:
    link = Link("slow", 1.0, 0.0, "made up")
    seconds = {}
    for window in (0, 9, 11, 200):
        costs = Analytic(
            replace(SHAPE, window=window), named_accelerator("ideal"), 2, context_parallel=2, context_link=link
        )
        seconds[window] = costs.forward_s(Part("attn", 0), Batch(1, (10, 20, 30)), 2)
    tokens = {window: taken / (2 * 8 * 2 / 2) for window, taken in seconds.items()}  # k and v, 8 elements of 2 bytes
    assert tokens == pytest.approx({0: 60, 9: 30 + 8, 11: 30 + 10, 200: 60})


# curves

PRICES = {"start": 1e-5, "tokens": 2e-7, "own": 3e-10, "earlier": 4e-10, "gathered": 1e-8, "merged": 5e-8}
LENGTHS = [(256, 0), (512, 0), (1024, 0), (2048, 0), (256, 256), (256, 512), (512, 512), (512, 1024), (128, 128)]


def test_terms_of_a_window_count_what_it_shows() -> None:
    for length, context, window in itertools.product((1, 5, 20), (0, 3, 30), (0, 1, 4, 25, 100)):
        size = Size(1, length, context, window)
        mine, before = range(context, context + length), range(context)
        assert size.own_pairs == sum(sees(i, j, False, window) for i in mine for j in mine)
        assert size.earlier_pairs == sum(sees(i, j, True, window) for i in mine for j in before)
        assert size.reached == sum(sees(context, j, True, window) for j in before)


def test_what_attention_with_a_window_costs_is_found_again() -> None:
    made_up = Curve(PRICES)
    points = [(size, made_up.seconds(size)) for size in (Size(1, *at, 300) for at in LENGTHS)]
    found = fit(points, ATTENTION)
    assert found.seconds(Size(1, 8192, 0, 300)) == pytest.approx(made_up.seconds(Size(1, 8192, 0, 300)), rel=1e-3)
    assert found.seconds(Size(1, 8192, 0, 300)) < 0.2 * Curve(PRICES).seconds(Size(1, 8192))


def profile(shape: ModelShape) -> Profile:
    timings = tuple(
        Timing(kind, PASSES[name], length, 0, 1e-6 * length) for kind, name in CURVES for length in (256, 512)
    )
    return Profile(shape, "none", "float32", 1, 1, "0", timings)


TOLD = (
    "profile: layers of this model have windows of different length (none and 9), and a profile times one attention; "
    "leave it away, and name an accelerator"
)


def test_a_profile_is_of_one_window() -> None:
    local = replace(SHAPE, window=9)
    profile(local).check_fits(replace(local, window_pattern=(True,)))
    profile(SHAPE).check_fits(replace(local, window_pattern=(False,)))
    with pytest.raises(ConfigError, match=r"^profile: measured with window 9 where 0 is asked for"):
        profile(local).check_fits(SHAPE)
    for refused in (
        lambda: profile(SHAPE).check_fits(MIXED),
        lambda: measure(MIXED, "cpu", torch.float32, ((16,), (32,)), rounds=1),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value) == TOLD
    again = Profile.from_json(measure(local, "cpu", torch.float32, ((16,), (32,)), rounds=1).to_json())
    assert again.shape.window == 9
    assert "--window 9" in again.command()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window_pattern": (True, False)},
         "model.window_pattern: which layers have a window, and there is none; set model.window too"),
        ({"window": -2}, "model.window: -2; give at least 0"),
        ({"softcap": -1.0}, "model.softcap: -1.0; give at least 0"),
        ({"softcap": float("nan")}, "model.softcap: nan; give at least 0"),
        ({"attention_scale": -0.5}, "model.attention_scale: -0.5; give at least 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(SHAPE, **given)
    assert str(caught.value) == message
