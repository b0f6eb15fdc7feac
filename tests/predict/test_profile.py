"""Measured costs: curves, what a profile prices, its file, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helixpipe.errors import ConfigError
from helixpipe.parts.part import LAYER_KINDS, Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.cost import action_seconds
from helixpipe.predict.curves import ATTENTION, LINEAR, TERMS, Size, fit
from helixpipe.predict.hardware import Link
from helixpipe.predict.profile import CURVES, PROFILED, WITH_WEIGHTS, Profile, Timing, merged
from helixpipe.schedule.action import Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.partition import from_costs

SHAPE = ModelShape(layers=4, hidden=128, heads=4, ffn=512, vocabulary=256, mlp="gelu")
SIZES = [Size(1, n) for n in (256, 512, 1024, 2048)] + [Size(1, 512, z) for z in (512, 1024, 1536)]
SIZES += [Size(1, 1024, 1024), Size(1, 256, 256), Size(1, 256, 1792)]
# seconds of a part's forward, I and W: a start, and so much a token; attention by the pairs of tokens
PRICES = {kind: {"start": 1e-5 * i, "tokens": 1e-6 * i} for i, kind in enumerate(PROFILED, start=1)}
PRICES["attn"] = {"start": 2e-5, "tokens": 1e-7, "own": 3e-9, "earlier": 5e-9, "gathered": 2e-8, "merged": 4e-7}
FACTOR = {"forward": 1.0, "input": 2.0, "weight": 1.5}
LINK = Link("measured", 1.5e9, 8e-5, "ping-pong between two ranks of this machine over gloo", host_s_per_byte=3e-10)


def cost(kind: str, name: str, at: Size) -> float:
    if name == "weight" and kind not in WITH_WEIGHTS:
        return 0.0
    return FACTOR[name] * sum(price * TERMS[term](at) for term, price in PRICES[kind].items())


def profile_of(noise: float = 0.0, **changes: Any) -> Profile:
    """What a machine with these prices would measure; every other timing above and below the curve by `noise`."""
    runs = {Pass.F: "forward", Pass.I: "input", Pass.W: "weight"}
    timings = tuple(
        Timing(kind, run, at.length, at.context, cost(kind, name, at) * (1 + (-1) ** i * noise))
        for kind in PROFILED
        for run, name in runs.items()
        for i, at in enumerate(SIZES)
        if (kind, name) in CURVES
    )
    facts = {"device": "AMD EPYC", "dtype": "float32", "threads": 1, "ranks": 2, "torch": "2.13.0", "link": LINK}
    return Profile(**({"shape": SHAPE, "timings": timings} | facts | changes))


PROFILE = profile_of()

prices = st.floats(1e-9, 1e-3)


@given(prices, prices)
def test_a_linear_curve_is_found_again(start: float, each: float) -> None:
    curve = fit([(at, start + each * at.length) for at in SIZES], LINEAR)
    assert curve.worst_error([(at, start + each * at.length) for at in SIZES]) < 1e-5
    assert curve.seconds(Size(2, 300)) == pytest.approx(start + each * 600, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from((0.0, 1e-9, 3e-9, 1e-8)), min_size=6, max_size=6))
def test_what_attention_costs_is_found_again(found: list[float]) -> None:
    assume(any(found))
    true = dict(
        zip(TERMS, [1e4 * found[0], 100 * found[1], found[2], found[3], 50 * found[4], 80 * found[5]], strict=True)
    )

    def seconds(at: Size) -> float:
        return sum(price * TERMS[term](at) for term, price in true.items())

    points = [(at, seconds(at)) for at in SIZES if seconds(at)]
    curve = fit(points, ATTENTION)
    assert curve.worst_error(points) < 1e-4
    assert all(price >= 0 for price in curve.prices_s.values())
    assert curve.seconds(Size(1, 800, 300)) == pytest.approx(seconds(Size(1, 800, 300)), rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=len(SIZES), max_size=len(SIZES)))
def test_no_price_is_below_zero_whatever_was_timed(seconds: list[float]) -> None:
    """Also for times that fall with length: more work then never costs less."""
    points = list(zip(SIZES, seconds, strict=True))
    curve = fit(points, ATTENTION)
    assert min(curve.prices_s.values()) >= 0
    assert curve.seconds(Size(1, 512, 512)) <= curve.seconds(Size(1, 513, 512)) <= curve.seconds(Size(1, 513, 600))


def test_a_fit_weighs_relative_errors() -> None:
    """A timing of 1 ms that is off by a tenth counts as much as one of 1 s."""
    points = [(Size(1, 1), 1.1e-3), (Size(1, 2), 1.8e-3), (Size(1, 1000), 1.1), (Size(1, 2000), 1.8)]
    curve = fit(points, ("tokens",))
    small, large = ([curve.seconds(at) / s for at, s in part] for part in (points[:2], points[2:]))
    assert small == pytest.approx(large)


def test_a_profile_prices_any_segment() -> None:
    batch = Batch(2, (700, 300, 500))
    for kind in PROFILED:
        for segment, context in enumerate((0, 700, 1000)):
            size = Size(2, batch.segment_lengths[segment], context)
            part = Part(kind, 0)
            assert PROFILE.forward_s(part, batch, segment) == pytest.approx(cost(kind, "forward", size), rel=1e-4)
            assert PROFILE.input_s(part, batch, segment) == pytest.approx(cost(kind, "input", size), rel=1e-4)
            assert PROFILE.weight_s(part, batch, segment) == pytest.approx(cost(kind, "weight", size), rel=1e-4)
    assert PROFILE.weight_s(Part("attn", 0), batch, 1) == 0
    assert PROFILE.worst_error < 1e-6


def test_an_opaque_layer_costs_what_its_parts_cost() -> None:
    batch = Batch(1, (1024,))
    whole = PROFILE.forward_s(Part("block", 0), batch, 0)
    assert whole == pytest.approx(sum(PROFILE.forward_s(Part(kind, 0), batch, 0) for kind in LAYER_KINDS))


def test_shards_have_their_share_of_the_whole_head() -> None:
    """What was measured of a whole vocabulary prices a spread one: the same work, and passes over x for what is joined."""
    batch = Batch(1, (1024,))
    for price in (PROFILE.forward_s, PROFILE.input_s, PROFILE.weight_s):
        head, embed, norm = (price(Part(kind, 0), batch, 0) for kind in ("head", "embed", "norm"))
        of = {part.kind: price(part, batch, 0) for part in chain(1, (), 4)}
        assert of["logits"] == pytest.approx(head / 4)
        assert (of["final"], of["lookup"], of["joined"], of["loss"]) == pytest.approx((norm, embed, 4 * embed, 0))


@pytest.mark.parametrize("family", ["1f1b", "zb_h1"])
def test_an_opaque_layer_whose_mlp_runs_in_slices_costs_as_much_as_one_that_is_not(family: str) -> None:
    batch, keeping = Batch(1, (1024,)), Keeping("none", mlp_chunk=256)
    split = build_schedule(family, ranks=1, layers=2, microbatches=1)
    opaque = build_schedule(family, ranks=1, layers=2, microbatches=1, opaque=(0, 1))
    taken = action_seconds(split, PROFILE.shape, batch, PROFILE, keeping)
    assert [
        action_seconds(opaque, PROFILE.shape, batch, PROFILE, keeping)(a) for a in opaque.ranks[0]
    ] == pytest.approx([taken(a) for a in split.ranks[0]])
    assert taken(split.ranks[0][1]) > action_seconds(split, PROFILE.shape, batch, PROFILE, Keeping("none"))(
        split.ranks[0][1]
    )


def test_actions_are_priced_from_it() -> None:
    """B of a stage under selective recompute: all but attention once more, then I and W."""
    schedule, batch = build_schedule("1f1b", ranks=1, layers=1, microbatches=1), Batch(1, (1024,))
    seconds = action_seconds(schedule, PROFILE.shape, batch, PROFILE, Keeping("selective"))
    forward, backward = (seconds(action) for action in schedule.ranks[0])
    at, kinds = Size(1, 1024), [part.kind for part in chain(1)]
    assert forward == pytest.approx(sum(cost(kind, "forward", at) for kind in kinds), rel=1e-4)
    again = forward - cost("attn", "forward", at)
    expected = again + sum(cost(kind, "input", at) + cost(kind, "weight", at) for kind in kinds)
    assert backward == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_partition_by_it_evens_out_what_segments_cost(recompute: str) -> None:
    seconds = PROFILE.partition_seconds(recompute)
    at = Size(1, 512, 1024)
    runs = {
        "none": {},
        "selective": dict.fromkeys(set(LAYER_KINDS) - {"attn"}, 1),
        "full": dict.fromkeys(LAYER_KINDS, 1),
    }
    expected = sum(cost(kind, name, at) for kind in LAYER_KINDS for name in FACTOR)
    expected += sum(cost(kind, "forward", at) for kind in runs[recompute])
    assert seconds(512, 1024) == pytest.approx(expected, rel=1e-4)
    lengths = from_costs(8192, 4, seconds, 64)
    each = [seconds(length, sum(lengths[:i])) for i, length in enumerate(lengths)]
    assert lengths[0] > lengths[-1]
    assert max(each) < 1.1 * min(each)


@given(st.integers(64, 8192), st.integers(1, 4096), st.integers(1, 4096))
def test_the_end_of_a_segment_costs_less_than_the_segment(context: int, length: int, more: int) -> None:
    """What partitions build on, with a past before both."""
    seconds = PROFILE.partition_seconds()
    assert seconds(length, context + more) <= seconds(length + more, context)
    assert seconds(length, context) <= seconds(length + more, context)


def test_sequences_beyond_the_measured_are_told() -> None:
    assert PROFILE.longest == 2048
    assert PROFILE.beyond(2048) == ""
    assert PROFILE.beyond(8192) == (
        "profile: 8,192 tokens are 4 times the longest measured (2,048), and costs are extrapolated; "
        "measure with helixpipe profile --model tiny --dtype float32 --sequence-length 8192"
    )


def test_json_round_trip(tmp_path: Path) -> None:
    for profile in (profile_of(0.03), profile_of(link=None, shape=replace(SHAPE, kv_heads=2, causal=False))):
        profile.save(tmp_path / "profile.json")
        again = Profile.load(tmp_path / "profile.json")
        assert again == profile
        assert again.curves == profile.curves


def test_the_worst_error_is_told() -> None:
    """Every other timing 4% above its curve and 4% below it."""
    assert 0.02 < profile_of(noise=0.04).worst_error < 0.08


def test_ranks_that_measured_at_once_become_one_profile() -> None:
    slower = replace(PROFILE, timings=tuple(t._replace(seconds=1.1 * t.seconds) for t in PROFILE.timings))
    both, batch = merged([PROFILE, slower], LINK), Batch(1, (1024,))
    assert both.ranks == 2
    assert both.link == LINK
    once = PROFILE.forward_s(Part("mlp", 0), batch, 0)
    assert once < both.forward_s(Part("mlp", 0), batch, 0) < 1.1 * once


WRONG = [
    (
        {"shape": replace(SHAPE, hidden=256, heads=8)},
        "profile: measured with hidden 128 where 256 is asked for, heads 4 where 8 is asked for; measure this one: "
        "helixpipe profile --model tiny --hidden 256 --heads 8 --kv-heads 4 --dtype float32 --sequence-length 2048",
    ),
    (
        {"shape": replace(SHAPE, causal=False, qk_norm=True)},
        "profile: measured with qk_norm False where True is asked for, causal True where False is asked for; measure this one: "
        "helixpipe profile --model tiny --qk-norm true --causal false --dtype float32 --sequence-length 2048",
    ),
    (
        {"shape": SHAPE, "device": "NVIDIA H200"},
        "profile: measured with device AMD EPYC where NVIDIA H200 is asked for; measure this one: "
        "helixpipe profile --model tiny --dtype float32 --sequence-length 2048",
    ),
    (
        {"shape": SHAPE, "dtype": "bfloat16"},
        "profile: measured with dtype float32 where bfloat16 is asked for; measure this one: "
        "helixpipe profile --model tiny --dtype bfloat16 --sequence-length 2048",
    ),
]


@pytest.mark.parametrize(("asked", "message"), WRONG)
def test_another_shape_device_or_precision_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PROFILE.check_fits(**asked)
    assert str(error.value) == message


def test_what_does_not_change_costs_is_no_matter() -> None:
    other = replace(SHAPE, layers=96, norm_eps=1e-6, rope_base=1e6, tied=True)
    PROFILE.check_fits(other, "AMD EPYC", "float32")
    PROFILE.check_fits(other)


def edited(**changes: Any) -> str:
    return json.dumps(json.loads(PROFILE.to_json()) | changes)


def shape_with(**changes: Any) -> dict[str, Any]:
    return json.loads(PROFILE.to_json())["shape"] | changes


BROKEN = [
    ("[]", 'not a profile: no "format": "helixpipe profile 1"; helixpipe profile writes these files'),
    ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); helixpipe profile writes these files"),
    (edited(format="x"), 'not a profile: no "format": "helixpipe profile 1"; helixpipe profile writes these files'),
    (edited(dtyp="x"), "dtyp: not a key of a profile; did you mean 'dtype'?"),
    (edited(threads="1"), 'threads: "1" is not a whole number'),
    (edited(shape=[]), "shape: [] is not an object"),
    (edited(shape=shape_with(causal=1)), "shape.causal: 1 is not true or false"),
    (edited(shape=shape_with(heads=0)), "model.heads: 0; give at least 1"),
    (edited(link={"name": "x"}), "link.bytes_per_s: missing"),
    (
        edited(link={"name": "x", "bytes_per_s": -1, "latency_s": 0.1, "source": ""}),
        "link.bytes_per_s: -1 is not a number from 0 up",
    ),
    (
        edited(link={"name": "x", "bytes_per_s": 0, "latency_s": 0.1, "source": ""}),
        "link.bytes_per_s: 0 is not a rate; measure again, or set link to null",
    ),
    (
        edited(timings=[["qkv", "F", 1024, 0, -1.0]]),
        'timings[0]: ["qkv", "F", 1024, 0, -1.0] is not a timing; one is ["qkv", "F", 1024, 0, 0.0125]',
    ),
    (
        edited(timings=[["qkv", "R", 1024, 0, 1.0]]),
        'timings[0]: ["qkv", "R", 1024, 0, 1.0] is not a timing; one is ["qkv", "F", 1024, 0, 0.0125]',
    ),
    (
        edited(timings=[["qkv", "F", 1024, 0, 1.0], "x"]),
        'timings[1]: "x" is not a timing; one is ["qkv", "F", 1024, 0, 0.0125]',
    ),
    (
        edited(timings=[["qkv", "F", 1024, 0, 1.0]]),
        "timings: embed forward has fewer than two lengths; measure again: "
        "helixpipe profile --model tiny --dtype float32 --sequence-length 1024",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        Profile.load(file)
    assert str(error.value) == f"{file}: {message}"


def test_a_file_from_before_processors_carried_messages() -> None:
    link = {"name": "x", "bytes_per_s": 1e9, "latency_s": 0.1, "source": ""}
    found = Profile.from_json(edited(link=link)).link
    assert found is not None
    assert found.host_s_per_byte == 0.0


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Profile.load(tmp_path / "none.json")
    assert str(error.value) == f"{tmp_path / 'none.json'}: cannot be read: no such file or directory"


def test_no_number_that_is_none() -> None:
    text = PROFILE.to_json().replace(str(LINK.bytes_per_s), "Infinity")
    with pytest.raises(ConfigError, match=r"^link.bytes_per_s: Infinity is not a number from 0 up$"):
        Profile.from_json(text)
    assert math.isfinite(PROFILE.worst_error)
