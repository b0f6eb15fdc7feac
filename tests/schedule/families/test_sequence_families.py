"""Interleaving and sequence segments: bubbles, peaks and orders, with costs from a table."""

from __future__ import annotations

import itertools

import pytest
from family_tools import makespan, passes

from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule

COSTS = [(1, 1), (1, 2), (3, 7)]


# Interleaved 1F1B


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 4), (4, 8), (8, 16)])
def test_the_bubble_and_peak_of_interleaved(p: int, m: int, v: int) -> None:
    """(p-1)(f+b)/v and ((v-1)p + 2(p-r-1) + 1)/v, of which no more than m exist."""
    schedule = build_schedule("interleaved", ranks=p, layers=p * v, microbatches=m, stages_per_rank=v)
    for f, b in COSTS:  # of one stage: a rank's share is v of them
        assert makespan(schedule, f, b) == m * v * (f + b) + (p - 1) * (f + b)
    assert peak_kept(schedule) == tuple(min((v - 1) * p + 2 * (p - r - 1) + 1, m * v) for r in range(p))
    assert {s % p for s, _ in schedule.placement} == set(range(p))
    assert all(rank == stage % p for (stage, _), rank in schedule.placement.items())


@pytest.mark.parametrize("m", [1, 3, 5, 7, 9, 13])
def test_micro_batches_that_do_not_divide_have_the_same_bubble(m: int) -> None:
    """Groups of 4, 5 or more: never one too short to feed the ranks."""
    schedule = build_schedule("interleaved", ranks=4, layers=12, microbatches=m, stages_per_rank=3)
    if m >= 4:
        assert makespan(schedule, 1, 2) == m * 9 + 3 * 3
    else:  # too few to feed four ranks in any order
        assert makespan(schedule, 1, 2) <= m * 9 + 3 * 9


def test_a_group_given_is_kept_and_ends_short() -> None:
    """Less is kept than with groups that are all but equal, and the short group costs time."""
    even, short = (
        build_schedule("interleaved", ranks=8, layers=32, microbatches=13, stages_per_rank=4, group=group)
        for group in (0, 8)
    )
    assert max(peak_kept(short)) < max(peak_kept(even))
    assert makespan(short, 1, 2) > makespan(even, 1, 2)
    first = [a for a in short.ranks[0] if a.kind is Pass.F]
    assert [a.microbatch for a in first[:8]] == list(range(8))
    assert [(a.stage, a.microbatch) for a in first[-5:]] == [(24, mb) for mb in range(8, 13)]


# Segments


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (4, 8), (8, 3), (8, 16)])
def test_the_bubble_and_peak_of_seq1f1b(p: int, m: int, k: int) -> None:
    """(p-1)(f+b)/k where segments cost the same, and min(p-r-1+k, mk)/k."""
    schedule = build_schedule("seq1f1b", ranks=p, layers=p, microbatches=m, segments=k)
    for f, b in COSTS:  # of one segment: a micro-batch is k of them
        assert makespan(schedule, f, b) == m * k * (f + b) + (p - 1) * (f + b)
    assert peak_kept(schedule) == tuple(min(p - r - 1 + k, m * k) for r in range(p))


def test_the_peaks_of_seq1f1b_that_the_paper_speaks_of() -> None:
    """p=8, k=4: 2.75 micro-batches on rank 0 and 1.0 on the last."""
    peaks = peak_kept(build_schedule("seq1f1b", ranks=8, layers=8, microbatches=16, segments=4))
    assert (peaks[0] / 4, peaks[-1] / 4) == (2.75, 1.0)


def test_seq1f1b_of_one_segment_is_1f1b() -> None:
    sizes = {"ranks": 4, "layers": 5, "microbatches": 7}
    assert build_schedule("seq1f1b", segments=1, **sizes) == build_schedule("1f1b", **sizes)
    assert build_schedule("interleaved", stages_per_rank=1, **sizes) == build_schedule("1f1b", **sizes)


def test_an_even_token_split_can_be_worse_than_1f1b() -> None:
    """Attention 80% of the work, p=8, m=16, k=4, f=1, b=2: idle 35.4 even, 5.25 balanced, 1F1B 21."""
    sizes = {"ranks": 8, "layers": 8, "microbatches": 16}
    schedule = build_schedule("seq1f1b", segments=4, **sizes)
    share = [0.2 / 4 + 0.8 * ((s + 1) ** 2 - s**2) / 16 for s in range(4)]
    even = simulate_schedule(schedule, lambda a: share[a.segment] * (1 if a.kind is Pass.F else 2))
    balanced = simulate_schedule(schedule, passes(1 / 4, 2 / 4))
    whole = simulate_schedule(build_schedule("1f1b", **sizes), passes(1, 2))
    assert [round(t.makespan_s - 16 * 3, 2) for t in (even, balanced, whole)] == [35.4, 5.25, 21]


@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("k", [8, 11, 16])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_bubble_and_peak_of_seq1f1b_interleaved(k: int, v: int, m: int) -> None:
    """(p-1)(f+b)/(kv), and 1 + 2(p-1)/(kv) of which no more than m exist, where k >= p."""
    schedule = build_schedule(
        "seq1f1b_interleaved", ranks=8, layers=8 * v, microbatches=m, segments=k, stages_per_rank=v
    )
    for f, b in COSTS:
        assert makespan(schedule, f, b) == m * k * v * (f + b) + 7 * (f + b)
    assert max(peak_kept(schedule)) == min(k * v + 2 * 7, m * k * v)


@pytest.mark.parametrize(("k", "m"), [(1, 8), (1, 9), (1, 15), (2, 5), (3, 7), (4, 3), (4, 5), (5, 4)])
def test_groups_that_do_not_divide_have_the_same_bubble(k: int, m: int) -> None:
    """(p-1)(f+b)/(kv) as soon as there are p units at all."""
    schedule = build_schedule("seq1f1b_interleaved", ranks=8, layers=32, microbatches=m, segments=k, stages_per_rank=4)
    assert makespan(schedule, 1, 2) == m * k * 4 * 3 + 7 * 3


def naive(p: int, m: int, k: int, v: int, g: int) -> Schedule:
    """Seq1F1B-I as one writes it down first: units in groups of g, the last one short."""
    units = [(mb, s) for mb in range(m) for s in range(k)]
    mirrored = [(mb, s) for mb in range(m) for s in reversed(range(k))]
    starts = range(0, m * k, g)
    forwards = [(c, Pass.F, *u) for at in starts for c in range(v) for u in units[at : at + g]]
    backwards = [(c, Pass.B, *u) for at in starts for c in reversed(range(v)) for u in mirrored[at : at + g]]
    orders = []
    for rank in range(p):
        ahead = min((v - 1) * g + 2 * (p - rank - 1) + k - 1, len(forwards))
        order = forwards[:ahead]
        for i, backward in enumerate(backwards):
            order += [*forwards[ahead + i : ahead + i + 1], backward]
        orders.append(tuple(Action(c * p + rank, *rest) for c, *rest in order))
    return Schedule(
        build_schedule("interleaved", ranks=p, layers=p * v, microbatches=1, stages_per_rank=v).stages, tuple(orders)
    )


def test_check_finds_the_deadlock_of_a_naive_ragged_group() -> None:
    """p=8, m=3, k=4, v=4: the last group is half a group. The family has an order for the same sizes."""
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 waits at .* for .*, on rank 7 behind"):
        check(naive(8, 3, 4, 4, g=8))
    schedule = build_schedule("seq1f1b_interleaved", ranks=8, layers=32, microbatches=3, segments=4, stages_per_rank=4)
    assert makespan(schedule, 1, 2) == 3 * 4 * 4 * 3 + 7 * 3
    ragged = {"ranks": 8, "layers": 32, "microbatches": 3, "segments": 4, "stages_per_rank": 4, "group": 8}
    check(build_schedule("seq1f1b_interleaved", **ragged))


def test_the_naive_order_is_ours_where_groups_divide() -> None:
    for p, m, k, v in [(8, 4, 4, 4), (4, 2, 4, 2), (3, 6, 1, 2), (2, 3, 5, 3)]:
        ours = build_schedule(
            "seq1f1b_interleaved", ranks=p, layers=p * v, microbatches=m, segments=k, stages_per_rank=v
        )
        assert ours.ranks == naive(p, m, k, v, g=k * -(-p // k)).ranks


def test_groups_of_p_units_deadlock_where_segments_do_not_divide_the_ranks() -> None:
    """The order of the authors' released code."""
    with pytest.raises(ScheduleError, match=r"deadlock|needs"):
        check(naive(4, 3, 3, 2, g=4))


def test_seq1f1b_interleaved_of_one_segment_is_interleaved() -> None:
    sizes = {"ranks": 4, "layers": 12, "microbatches": 8, "stages_per_rank": 3}
    assert build_schedule("seq1f1b_interleaved", segments=1, **sizes) == build_schedule("interleaved", **sizes)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("seq1f1b", {"segments": 0}, "schedule.segments: 0; give at least 1 (1 keeps the sequence whole)"),
        (
            "seq1f1b",
            {"segments": 2, "opaque": (1, 3)},
            "schedule.segments: 2 segments need layers that hand on keys and values, and layer 1 is one opaque block; "
            "use segments = 1",
        ),
        (
            "interleaved",
            {"stages_per_rank": 3},
            "schedule.stages_per_rank: 4 layers cannot fill 2 ranks of 3 stages each; use at most 2",
        ),
        ("interleaved", {"stages_per_rank": 0}, "schedule.stages_per_rank: 0; give at least 1"),
        (
            "seq1f1b_interleaved",
            {"segments": 3, "group": 4},
            "schedule.group: 4 units; give a multiple of 3 segments that is at least 3, to feed 2 ranks",
        ),
        (
            "seq1f1b_interleaved",
            {"segments": 1, "group": 1},
            "schedule.group: 1 units; give a multiple of 1 segments that is at least 2, to feed 2 ranks",
        ),
    ],
)
def test_what_cannot_be_built_says_what_can(family: str, given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_schedule(family, **({"ranks": 2, "layers": 4, "microbatches": 4} | given))
    assert str(error.value) == message


# TeraPipe, breadth-first and SlimPipe


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("p", "m"), [(1, 2), (4, 8), (8, 3)])
def test_the_bubble_and_peak_of_terapipe(p: int, m: int, k: int) -> None:
    """(p-1)(f+b)/k, and m."""
    schedule = build_schedule("terapipe", ranks=p, layers=p, microbatches=m, segments=k)
    assert makespan(schedule, 1, 2) == m * k * 3 + (p - 1) * 3
    assert peak_kept(schedule) == (m * k,) * p


@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize(("p", "m"), [(1, 2), (4, 4), (4, 9), (8, 16)])
def test_the_bubble_and_peak_of_breadth_first(p: int, m: int, v: int) -> None:
    """(p-1)(f+b)/v and m; a stage's forwards come one after another, and so do its backwards."""
    schedule = build_schedule("breadth_first", ranks=p, layers=p * v, microbatches=m, stages_per_rank=v)
    for f, b in COSTS:
        assert makespan(schedule, f, b) == m * v * (f + b) + (p - 1) * (f + b)
    assert peak_kept(schedule) == (m * v,) * p
    for order in schedule.ranks:
        runs = [key for key, _ in itertools.groupby((a.stage, a.kind) for a in order)]
        assert len(runs) == len(set(runs)) == 2 * v


def test_terapipe_of_one_segment_is_gpipe() -> None:
    sizes = {"ranks": 3, "layers": 4, "microbatches": 5}
    assert build_schedule("terapipe", segments=1, **sizes) == build_schedule("gpipe", **sizes)


def test_slimpipe_is_seq1f1b_interleaved() -> None:
    sizes = {"ranks": 4, "layers": 8, "microbatches": 3, "segments": 4, "stages_per_rank": 2}
    slimpipe = build_schedule("slimpipe", **sizes)
    assert slimpipe == build_schedule("seq1f1b_interleaved", **sizes)
    assert max(peak_kept(slimpipe)) == 8 + 2 * 3  # 1 + 2(p-1)/(kv) micro-batches of kv units
