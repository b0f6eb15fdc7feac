"""A schedule priced: the published ratios, and every rank's bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import helixpipe as hp
from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.cost import PartCosts
from helixpipe.predict.estimate import Setting, estimate, estimate_family
from helixpipe.predict.hardware import Link, named_accelerator, named_link
from helixpipe.predict.replay import replayed
from helixpipe.predict.standing import owned_and_visiting, standing_bytes, summed_bytes
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.partition import even
from helixpipe.schedule.program import Run
from helixpipe.schedule.schedule import Schedule

# the 7B model of the papers; a head that weighs nothing, as their formulas have it
SHAPE = replace(SHAPES["7b"], vocabulary=1)
LONG = Setting(SHAPE, 131072, keeping=Keeping("none", 2))
TINY = ModelShape(layers=4, hidden=16, heads=2, ffn=64, vocabulary=32)


def elements(schedule: Schedule, shape: ModelShape) -> list[list[int]]:
    """Per rank, of the parameters it owns, and of those that only visit it."""
    return [[sum(each.values()) for each in found] for found in owned_and_visiting(schedule, shape)]


def ratio(family: str, recompute: str = "none", **options: object) -> float:
    setting = replace(LONG, keeping=Keeping(recompute, 2))
    found = estimate_family(setting, family, 8, 16, **options)
    return found.timeline.makespan_s / found.ideal_s


def test_the_published_ratios_at_128k() -> None:
    """p=8, m=16, causal, free messages, over the step without bubble and recompute."""
    assert ratio("1f1b") == pytest.approx(1.4375, rel=1e-3)
    naive = {"folds": 1, "groups": "forward_first"}
    assert ratio("helix", **naive) == pytest.approx(1.0266, rel=1e-3)
    assert ratio("helix", "selective", **naive) == pytest.approx(1.1166, rel=1e-3)
    assert ratio("interleaved", stages_per_rank=4) == pytest.approx(1.109, rel=1e-3)
    assert ratio("seq1f1b_interleaved", segments=16, stages_per_rank=4) == pytest.approx(1.007, abs=2e-3)


def test_the_peak_is_that_of_the_fullest_rank_and_each_rank_has_its_own() -> None:
    found = estimate_family(LONG, "1f1b", 8, 16)
    peaks = found.timeline.peak_bytes
    assert found.peak_bytes == max(peaks) == peaks[0]
    assert sorted(peaks[:-1], reverse=True) == list(peaks[:-1])  # the first ranks keep the most forwards
    for rank, standing in enumerate(found.timeline.standing):
        kinds = zip(*(point[1:] for point in found.timeline.memory[rank]), strict=True)
        assert sum(standing) < peaks[rank] <= sum(standing) + sum(map(max, kinds))


def test_what_stands_on_a_rank() -> None:
    """Float32: weight, gradient, two moments, 16 bytes a parameter; bfloat16 has a working copy beside it."""
    schedule = build_schedule("1f1b", ranks=2, layers=4, microbatches=2)
    owned, visiting = elements(schedule, TINY)
    assert sum(owned) == TINY.parameter_count
    assert visiting == [0, 0]
    for size, per_parameter in ((4, (4, 4, 8)), (2, (6, 4, 8)), (8, (8, 8, 16))):
        for own, standing in zip(owned, standing_bytes(schedule, TINY, Keeping("none", size)), strict=True):
            assert tuple(standing) == tuple(own * each for each in per_parameter)
    shared = standing_bytes(schedule, TINY, Keeping("none", 4), optimizer_shards=4)
    assert [tuple(each)[:2] for each in shared] == [(4 * own, 4 * own) for own in owned]


def test_replicas_deal_out_whole_parameters_and_the_one_with_most_is_predicted() -> None:
    """One layer: gate, up, down of 1024, embedding and head of 512, q, k, v, o of 256, three norms of 16. 4 replicas."""
    one = replace(TINY, layers=1)
    schedule = build_schedule("1f1b", ranks=1, layers=1, microbatches=2)
    # of 4: 1024 | 1024 | 1024 | 512 + 512, each 256 more, and three of them a norm
    assert one.parameter_count == 3 * 1024 + 2 * 512 + 4 * 256 + 3 * 16
    for shards, most in ((1, one.parameter_count), (2, 2592), (3, 1792), (4, 1296), (8, 1024), (99, 1024)):
        (standing,) = standing_bytes(schedule, one, Keeping("none", 4), shards)
        assert standing.optimizer_bytes == 8 * most
    wire = Link("wire", 1e6, 0.0, "made up")
    setting = replace(LONG, shape=one, link=wire, data_parallel=4)
    plain, sharded = (estimate(schedule, replace(setting, optimizer=name)) for name in ("replicated", "sharded"))
    assert sharded.timeline.standing[0].optimizer_bytes == 8 * 1296
    assert sharded.timeline.standing[0][:2] == plain.timeline.standing[0][:2]
    # every update goes to all, in float32
    assert sharded.reduction_s - plain.reduction_s == pytest.approx(one.parameter_count * 4 / 1e6)


def test_tensor_parallelism_divides_what_has_heads_or_ffn_and_keeps_the_rest_whole() -> None:
    """Embedding, head and norms are on every rank of a tp line, as `runtime.tensor` leaves them."""
    schedule = build_schedule("1f1b", ranks=2, layers=4, microbatches=2)
    owned, _ = elements(schedule, TINY)
    table = TINY.vocabulary * TINY.hidden
    whole = [table + 2 * 2 * TINY.hidden, table + (2 * 2 + 1) * TINY.hidden]  # two layers' norms; the head has one
    halved = standing_bytes(schedule, TINY.tensor_share(2), Keeping("none", 4))
    for own, kept, standing in zip(owned, whole, halved, strict=True):
        assert standing.weights_bytes == 4 * (kept + (own - kept) // 2)
    found = estimate(schedule, replace(LONG, shape=TINY, tensor_parallel=2))
    assert found.timeline.standing == standing_bytes(schedule, TINY.tensor_share(2), LONG.keeping)
    fewer = estimate(schedule, replace(LONG, shape=TINY, tensor_parallel=2, megatron=True))
    # Megatron divides the vocabulary too: 18 bytes a parameter, of half a table
    more = [sum(a) - sum(b) for a, b in zip(found.timeline.standing, fewer.timeline.standing, strict=True)]
    assert more == [18 * table // 2] * 2


def test_what_visits_does_not_stand() -> None:
    """It comes and goes: see `test_guests`."""
    schedule = build_schedule("helix", ranks=2, layers=4, microbatches=4, travel="qkv")
    owned, visiting = elements(schedule, TINY)
    qkv = 3 * TINY.hidden**2
    assert visiting == [2 * qkv, 2 * qkv]  # the other rank's two layers
    standing = standing_bytes(schedule, TINY, Keeping("none", 2))
    assert standing[0].weights_bytes == 6 * owned[0]
    assert standing[0].gradients_bytes == 4 * owned[0]
    assert standing[0].optimizer_bytes == 8 * owned[0]


def test_a_tied_table_visits_the_head() -> None:
    tied = replace(TINY, tied=True)
    schedule = build_schedule("1f1b", ranks=2, layers=4, microbatches=2)
    owned, visiting = elements(schedule, tied)
    assert sum(owned) == tied.parameter_count
    assert visiting == [0, tied.vocabulary * tied.hidden]


def test_the_program_is_the_one_that_training_runs() -> None:
    schedule = LONG.build("helix", 4, 8)
    found = estimate(schedule, LONG)
    trained = lower(schedule, SHAPE, LONG.batch(1))
    told = [[str(i) for i in rank] for rank in found.program.ranks]
    assert told == [[str(i) for i in rank] for rank in trained.ranks]
    assert found.timeline.order == tuple(tuple(i.action for i in rank if isinstance(i, Run)) for rank in trained.ranks)


def test_tensor_parallel_shares_activations_and_messages() -> None:
    setting = replace(LONG, accelerator=named_accelerator("h20"), link=named_link("infiniband"))
    alone = estimate_family(setting, "1f1b", 4, 8)
    eight = estimate_family(replace(setting, tensor_parallel=8, tensor_link=named_link("nvlink")), "1f1b", 4, 8)
    # what qkv and the MLP read is gathered, and each keeps it whole; 4 micro-batches of 8 layers are under way
    gathered = 4 * 8 * 2 * 131072 * SHAPE.hidden * 2
    kept = alone.timeline.peak_kept_bytes[0]
    assert eight.timeline.peak_kept_bytes[0] == (kept - gathered) // 8 + gathered
    megatron = replace(setting, tensor_parallel=8, tensor_link=named_link("nvlink"), megatron=True)
    assert estimate_family(megatron, "1f1b", 4, 8).timeline.peak_kept_bytes[0] == kept // 8
    assert alone.timeline.makespan_s / 8 < eight.timeline.makespan_s < alone.timeline.makespan_s / 6
    message = alone.program.messages[0]
    assert eight.message_seconds(message) < alone.message_seconds(message)


def test_context_parallel_shares_tokens_and_pays_for_its_ring() -> None:
    setting = replace(LONG, accelerator=named_accelerator("h20"), link=named_link("infiniband"))
    alone, four = (estimate_family(replace(setting, context_parallel=c), "1f1b", 4, 8) for c in (1, 4))
    assert four.timeline.makespan_s == pytest.approx(alone.timeline.makespan_s / 4, rel=0.01)  # the ring is hidden
    assert four.timeline.peak_kept_bytes[0] == alone.timeline.peak_kept_bytes[0] // 4
    assert four.timeline.standing == alone.timeline.standing  # weights are whole on each
    slow = replace(setting, context_parallel=4, link=Link("slow", 1e9, 0.0, "made up"))
    ring_s = 2 * 131072 * SHAPE.kv_size * 0.75 * 2 / 1e9
    assert slow.costs.forward_s(Part("attn", 0), slow.whole, 0) == pytest.approx(ring_s, rel=1e-3)
    assert slow.costs.input_s(Part("attn", 0), slow.whole, 0) == pytest.approx(3 * ring_s, rel=1e-3)  # bf16 and float32


def test_data_parallel_sums_gradients_once_a_step() -> None:
    """A ring's all-reduce: 2 (N-1)/N of the fullest rank's float32 gradients."""
    setting = replace(LONG, link=Link("wire", 1e9, 0.0, "made up"))
    alone, four = (estimate_family(replace(setting, data_parallel=d), "1f1b", 4, 8) for d in (1, 4))
    assert alone.reduction_s == 0
    owned, _ = elements(alone.schedule, SHAPE)
    assert four.reduction_s == pytest.approx(2 * 0.75 * max(owned) * 4 / 1e9)
    assert four.step_s == four.timeline.makespan_s + four.reduction_s
    assert four.tokens_per_s == pytest.approx(4 * alone.tokens_per_s * alone.step_s / four.step_s)


def test_tensor_parallel_ranks_sum_gradients_of_what_they_do_not_divide() -> None:
    """Over all that hold the same: tp ranks over their own link, replicas of them over that between nodes."""
    wire, inside = Link("wire", 1e9, 0.0, "made up"), Link("inside", 1e10, 0.0, "made up")
    setting = replace(LONG, shape=TINY, link=wire, tensor_parallel=2, tensor_link=inside)
    schedule = build_schedule("1f1b", ranks=1, layers=4, microbatches=2)
    whole = 2 * TINY.vocabulary * TINY.hidden + (2 * 4 + 1) * TINY.hidden
    divided = (TINY.parameter_count - whole) // 2
    assert estimate(schedule, setting).reduction_s == pytest.approx(2 * 0.5 * whole * 4 / 1e10)
    both = estimate(schedule, replace(setting, data_parallel=4))
    assert both.reduction_s == pytest.approx((2 * 0.75 * divided + 2 * 7 / 8 * whole) * 4 / 1e9)


def test_a_replay_has_the_bytes_of_one_accelerator() -> None:
    setting = replace(LONG, shape=TINY, sequence_length=64, tensor_parallel=2, context_parallel=2)
    found = estimate_family(setting, "1f1b", 2, 4)
    again = replayed(found.schedule, found.timeline, setting)
    assert again.peak_kept_bytes == found.timeline.peak_kept_bytes
    alone = estimate_family(replace(setting, tensor_parallel=1, context_parallel=1), "1f1b", 2, 4).timeline
    for shared, whole in zip(again.peak_kept_bytes, alone.peak_kept_bytes, strict=True):
        assert whole / 4 < shared < whole / 3


def test_a_slow_link_makes_a_step_longer() -> None:
    setting = replace(LONG, accelerator=named_accelerator("h100"))
    times = [
        estimate_family(replace(setting, link=named_link(name)), "helix", 8, 16).timeline.makespan_s
        for name in ("free", "nvlink", "infiniband", "ethernet")
    ]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_a_step_ends_when_the_last_weight_gradient_is_home() -> None:
    slow = Link("slow", 1e3, 0.0, "made up")
    setting = Setting(SHAPES["tiny"], 128, named_accelerator("h100"), slow, Keeping("none", 2))
    found = estimate_family(setting, "helix", 2, 4, travel="attention")
    assert found.step_s == found.timeline.settled_s > found.timeline.makespan_s
    assert estimate_family(setting, "helix", 2, 4, travel="none").timeline.settled_s == 0


def test_the_face() -> None:
    schedule = hp.build_schedule("helix", ranks=8, layers=32, microbatches=16, folds=2, travel="qkv")
    timeline = hp.simulate(schedule, model="7b", hardware="h20", sequence_length=32768, link="infiniband")
    assert timeline.makespan_s > 0
    assert 0 < timeline.bubble_ratio < 1
    assert len(timeline.peak_bytes) == 8
    longer = hp.simulate(schedule, model=hp.named_shape("7b"), hardware="h20", sequence_length=65536)
    assert longer.makespan_s > 2 * timeline.makespan_s * 0.9


def test_the_face_works_as_the_accelerator_does() -> None:
    """CUDA's attention makes q's gradient in float32; a CPU's has a tile of scores a thread."""
    schedule = hp.build_schedule("1f1b", ranks=2, layers=4, microbatches=2)
    cuda, cpu = (
        hp.simulate(schedule, model="tiny", hardware=name, recompute="none") for name in ("h100", "laptop-core")
    )
    assert cuda.peak_kept_bytes == cpu.peak_kept_bytes
    assert cuda.peak_activation_bytes != cpu.peak_activation_bytes


@pytest.mark.parametrize("profile", [None, LONG.costs])
def test_segments_are_cut_by_cost_and_moved_towards_even(profile: PartCosts | None) -> None:
    """By FLOPs, and by what a profile has measured."""
    setting = replace(LONG, profile=profile)
    cut = setting.segment_lengths(8)
    moved = replace(setting, evenness=0.5).segment_lengths(8)
    evenly = replace(setting, partition="even").segment_lengths(8)
    assert cut[0] > moved[0] > evenly[0] == 131072 // 8
    assert cut[-1] < moved[-1] < evenly[-1]
    assert replace(setting, evenness=1.0).segment_lengths(8) == evenly
    assert {sum(lengths) for lengths in (cut, moved, evenly)} == {131072}
    assert setting.batch(1) == Batch(1, (131072,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 0}, "sequence_length: 0; give at least 1"),
        ({"microbatch_size": -1}, "microbatch_size: -1; give at least 1"),
        (
            {"context_parallel": 3},
            "train.sequence_length: 131072 tokens do not divide for ring over cp 3, tp 1, whose zigzag layout needs a "
            "multiple of 6; use 131070 or 131076",
        ),
        (
            {"tensor_parallel": 5},
            "mesh.tp: 5 ranks do not divide model.heads 32; tp may be 1, 2, 4, 8, 16 or 32",
        ),
    ],
)
def test_a_setting_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(LONG, **change)
    assert str(caught.value) == message


def test_a_profile_prices_one_device() -> None:
    setting = replace(LONG, profile=LONG.costs, tensor_parallel=2)
    assert setting.segment_lengths(4) == LONG.segment_lengths(4)  # in seconds of one device at a rate, as by FLOPs
    with pytest.raises(ConfigError, match=r"^profile: measured on one device alone; leave tp and cp at 1$"):
        estimate_family(setting, "1f1b", 2, 2)


def test_the_partition_is_the_familys_own_unless_asked_otherwise() -> None:
    setting = replace(LONG, sequence_length=4096)
    lengths = {
        family: estimate_family(setting, family, 2, 2, segments=4).program.batches[0].segment_lengths
        for family in ("slimpipe", "seq1f1b_interleaved")
    }
    assert lengths["slimpipe"] == even(4096, 4) != lengths["seq1f1b_interleaved"]
    for asked in ("even", "computation_wise"):
        for family in lengths:
            assert replace(setting, partition=asked).of_family(family).partition == asked


@pytest.mark.parametrize("change", [{}, {"partition": "even"}, {"profile": LONG.costs}])
def test_segments_need_causal_attention_however_they_are_cut(change: dict[str, Any]) -> None:
    shape = replace(TINY, causal=False)
    schedule = build_schedule("seq1f1b", ranks=2, layers=4, microbatches=2, segments=2)
    with pytest.raises(ConfigError, match=r"^schedule.segments: 2 segments need causal attention"):
        hp.simulate(schedule, shape, sequence_length=1024, **change)
    whole = build_schedule("1f1b", ranks=2, layers=4, microbatches=2)
    assert hp.simulate(whole, shape, sequence_length=1024, **change).makespan_s > 0


def test_evenness_beyond_its_range() -> None:
    with pytest.raises(ConfigError, match=r"^schedule.evenness: 2; give 0 \(computation-wise\) to 1 \(even\)$"):
        replace(LONG, evenness=2.0).segment_lengths(4)
    with pytest.raises(ConfigError, match=r"^schedule.evenness: 2; give 0"):
        replace(LONG, evenness=2.0, profile=LONG.costs).segment_lengths(4)


def test_what_families_balance_by_is_counted_in_layers() -> None:
    """F, I and W of a layer are ratios, and none is nothing: for a tiny model, and where attention is nearly all."""
    for setting in (Setting(TINY, 64), replace(LONG, sequence_length=2**24)):
        forward, inputs, weights = setting.balance["costs"]
        assert forward == 1
        assert inputs > 1 > weights > 0


def test_a_sum_of_gradients_holds_them_once_more() -> None:
    """At the step's end, where activations were few: what is put together for one sum, a bucket at most."""
    shape = ModelShape(layers=2, hidden=64, heads=4, ffn=128, vocabulary=256)
    short = Setting(shape, 32, keeping=Keeping("none", 4), data_parallel=2)
    found = estimate_family(short, "1f1b", 1, 1)
    assert found.timeline.memory[0][-1][1:] == (0, 4 * shape.parameter_count, 0)
    assert found.peak_bytes == sum(found.timeline.standing[0]) + 4 * shape.parameter_count
    alone = estimate_family(replace(short, data_parallel=1), "1f1b", 1, 1)
    assert alone.timeline.memory[0] == found.timeline.memory[0][:-1]
    long = estimate_family(replace(short, sequence_length=4096), "1f1b", 1, 1)
    assert long.timeline.memory[0][-1].transit_bytes == 0


def test_the_largest_bucket_of_a_sum() -> None:
    whole = {"a": 2**22, "b": 2**22, "c": 2**22, "d": 10}
    assert summed_bytes(whole, whole, 2, 1, 4) == 2**25  # a and b
    assert summed_bytes(whole, whole, 1, 1, 4) == 0
    held = {"a": 2**21, "b": 2**21, "c": 2**21, "d": 10}
    assert summed_bytes(whole, held, 1, 2, 4) == 40  # what tp divides is nobody else's
    assert summed_bytes(whole, held, 2, 2, 4) == 3 * 2**23
