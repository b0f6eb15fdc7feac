"""Prices of micro-batches that differ: FLOPs, seconds and bytes of each, against sums over masks and over each one alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.cost import Analytic, action_seconds
from helixpipe.predict.estimate import Setting, estimate, priced
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.profile import CURVES, PASSES, Profile, Timing
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Kind
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage

SHAPE = ModelShape(layers=4, hidden=32, heads=4, ffn=64, vocabulary=50)
IDEAL = named_accelerator("ideal")
LENGTH = 256
ROWS = (((LENGTH,),), ((100, 100, 56),), ((16,) * 16,), ((200, 8, 8, 40),))
"""Of four micro-batches of one sequence."""


def pairs_by_mask(lengths: tuple[int, ...], start: int, stop: int) -> float:
    """Kernels count half of the diagonal."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (ids[:, None] == ids[None, :]).tril()
    return int(seen[start:stop].sum()) - (stop - start) / 2


def test_attention_takes_the_time_of_the_pairs_that_its_documents_show() -> None:
    """A product of 2 FLOPs an element of a head, for scores and for values: 4 q_size a pair; backward 2.5 times that."""
    schedule = build_schedule("seq1f1b", ranks=2, layers=4, microbatches=4, segments=2)
    batches = [Batch(1, (160, 96), rows) for rows in ROWS]
    taken = action_seconds(schedule, SHAPE, batches, Analytic(SHAPE, IDEAL), Keeping("none", 4))
    rate = IDEAL.rate(4) * IDEAL.attention_efficiency
    for order in schedule.ranks:
        for action in order:
            lengths = ROWS[action.microbatch][0]
            start, stop = ((0, 160), (160, 256))[action.segment]
            first = next(a for a in order if a.stage == action.stage)._replace(
                kind=action.kind, microbatch=2, segment=action.segment
            )
            more = pairs_by_mask(lengths, start, stop) - pairs_by_mask(ROWS[2][0], start, stop)
            times = 1.0 if action.kind is Pass.F else 2.5
            assert taken(action) - taken(first) == pytest.approx(2 * times * 4 * SHAPE.q_size * more / rate, abs=1e-18)


@pytest.mark.parametrize("family", ["1f1b", "zb_v", "helix"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_each_micro_batch_costs_what_it_costs_where_all_are_like_it(family: str, recompute: str) -> None:
    schedule = build_schedule(family, ranks=2, layers=4, microbatches=4)
    costs, keeping = Analytic(SHAPE, named_accelerator("h100")), Keeping(recompute, 2, mlp_chunk=64)
    batches = [Batch(1, (LENGTH,), rows) for rows in ROWS]
    together = action_seconds(schedule, SHAPE, batches, costs, keeping)
    for mb, batch in enumerate(batches):
        alone = action_seconds(schedule, SHAPE, batch, costs, keeping)
        for order in schedule.ranks:
            assert all(together(a) == alone(a) for a in order if a.microbatch == mb)


def test_the_ideal_is_the_work_of_these_very_batches() -> None:
    setting = Setting(SHAPE, LENGTH, IDEAL, keeping=Keeping("none", 2))
    schedule = build_schedule("1f1b", ranks=2, layers=4, microbatches=4)
    batches = [setting.batch(1, rows) for rows in ROWS]
    found = estimate(schedule, setting, batches)
    plain = estimate(schedule, setting)
    saved = sum(pairs_by_mask((LENGTH,), 0, LENGTH) - pairs_by_mask(lengths, 0, LENGTH) for (lengths,) in ROWS)
    saved_s = 3.5 * 4 * SHAPE.q_size * saved * SHAPE.layers / (IDEAL.rate(2) * IDEAL.attention_efficiency)
    assert (plain.ideal_s - found.ideal_s) * 2 == pytest.approx(saved_s)
    assert sum(found.timeline.busy_s) == pytest.approx(found.ideal_s * 2)
    assert priced(found.program, setting).step_s == found.step_s


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("passes", ["B", "IW"])
def test_predicted_bytes_are_of_each_micro_batch_s_own_segments(recompute: str, passes: str) -> None:
    """Where micro-batches follow one another, each one's fullest moment is that of a step of its like."""
    backward = [Pass(each) for each in passes]
    order = [
        action
        for mb in range(3)
        for action in (
            *(Action(0, Pass.F, mb, s) for s in (0, 1)),
            *(Action(0, p, mb, s) for s in (1, 0) for p in backward),
        )
    ]
    schedule = Schedule((Stage(chain(SHAPE.layers)),), (tuple(order),))
    setting = Setting(SHAPE, LENGTH, IDEAL, keeping=Keeping(recompute, 2))
    cuts = [Batch(1, (200, 56), ROWS[1]), Batch(1, (40, 216), ROWS[2]), Batch(1, (128, 128), ROWS[3])]

    def most(of: list[Batch]) -> list[int]:
        timeline = estimate(schedule, setting, of).timeline
        ends = [max(s.end_s for s in timeline.spans[0] if s.action.microbatch == mb) for mb in range(3)]
        found, start = [], 0.0
        for end in ends:
            found.append(
                max(p.activation_bytes + p.workspace_bytes for p in timeline.memory[0] if start <= p.time_s < end)
            )
            start = end
        return found

    together = most(cuts)
    assert together == [most([each] * 3)[mb] for mb, each in enumerate(cuts)]
    assert len(set(together)) == 3


def test_a_ring_carries_what_a_segment_sees_of_its_documents() -> None:
    """On a link so slow that attention waits for it: earlier keys that no document reaches do not travel."""
    slow = replace(named_link("infiniband"), bytes_per_s=1e3, latency_s=0.0)
    costs = Analytic(SHAPE, IDEAL, 2, context_parallel=2, context_link=slow)
    attention = Part("attn", 0)
    whole, one, none = (
        costs.forward_s(attention, Batch(1, (128, 128), rows), 1)
        for rows in (((256,),), ((100, 156),), ((128, 128),))
    )  # fmt: skip
    a_token = 2 * SHAPE.kv_size * 2 / 2 / 1e3
    assert whole == pytest.approx(256 * a_token, rel=1e-3)
    assert one == pytest.approx((28 + 128) * a_token, rel=1e-3)
    assert none == pytest.approx(128 * a_token, rel=1e-3)


def test_a_setting_cuts_each_micro_batch_by_its_documents() -> None:
    setting = Setting(SHAPE, 4096, IDEAL, segment_multiple=64)
    plain = setting.batch(4)
    assert setting.batch(4, [(4096,)]) == replace(plain, documents=((4096,),))
    by_documents = setting.batch(4, [(64,) * 64])
    assert by_documents.segment_lengths == (1024,) * 4 != plain.segment_lengths
    assert by_documents.documents == ((64,) * 64,)
    with pytest.raises(ConfigError, match="add up to 10 and a sequence has 4096"):
        setting.batch(4, [(4, 6)])
    with pytest.raises(ConfigError, match="of 2 sequences, and a micro-batch has 1"):
        setting.batch(4, [(4096,)] * 2)


def measured(pair_s: float) -> Profile:
    """A microsecond a token of any part, and `pair_s` a pair of tokens that attention shows, earlier ones or its own."""

    def seconds(kind: str, length: int, context: int) -> float:
        return length * 1e-6 + (pair_s * (length * length + length * context) if kind == "attn" else 0.0)

    timings = tuple(
        Timing(kind, PASSES[name], length, context, seconds(kind, length, context))
        for kind, name in CURVES
        for length, context in ((256, 0), (512, 0), (1024, 0), (256, 256), (256, 512), (512, 512))
    )
    return Profile(SHAPE, "none", "float32", 1, 1, "0", timings)


def test_measured_attention_is_priced_a_document_at_a_time() -> None:
    profile, attention = measured(1e-7), Part("attn", 0)
    batch = Batch(2, (300, 212), ((300, 212), (100, 300, 112)))
    # row 0 begins a document there; row 1 goes on in one, 200 tokens into it, and begins another
    assert profile.forward_s(attention, batch, 1) == pytest.approx(
        2 * 212e-6 + 1e-7 * (212**2 + 100**2 + 100 * 200 + 112**2), rel=1e-6
    )
    assert profile.forward_s(Part("mlp", 0), batch, 1) == profile.forward_s(Part("mlp", 0), Batch(2, (300, 212)), 1)
    setting = Setting(SHAPE, 4096, profile=profile, segment_multiple=64, keeping=Keeping("none", 4))
    cut = setting.batch(4, [(64,) * 64])
    assert max(cut.segment_lengths) - min(cut.segment_lengths) <= 64
    assert setting.batch(4).segment_lengths[0] > 1400


def test_messages_take_what_their_own_segments_weigh() -> None:
    setting = Setting(SHAPE, LENGTH, IDEAL, replace(named_link("infiniband"), latency_s=0.0), Keeping("none", 2))
    schedule = build_schedule("seq1f1b", ranks=2, layers=4, microbatches=2, segments=2)
    batches = [Batch(1, (200, 56), ROWS[1]), Batch(1, (40, 216), ROWS[2])]
    found = estimate(schedule, setting, batches)
    for message in found.program.messages:
        if message.kind is Kind.VALUES:
            at = message.producer
            assert at is not None
            tokens = batches[at.microbatch].segment_lengths[at.segment]
            assert found.message_seconds(message) == setting.link.seconds(tokens * SHAPE.hidden * 2)
    assert lower(schedule, SHAPE, batches).batches == tuple(batches)
    assert not math.isnan(found.step_s)
