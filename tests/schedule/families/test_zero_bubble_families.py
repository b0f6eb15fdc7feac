"""Split backward and V placement: bubbles, peaks and orders, with costs from a table."""

from __future__ import annotations

import pytest
from family_tools import longest_span, makespan, passes, warm_up

from helixpipe.errors import ConfigError
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule.action import Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule

UNITS = passes(1, 1, 1)


def build(family: str, p: int, m: int, **given: object) -> Schedule:
    """With two layers a rank, which the V placements need."""
    return build_schedule(family, ranks=p, layers=2 * p, microbatches=m, **given)


def idle_between(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """The most that a rank stands still between its first action and its last."""
    spans = simulate_schedule(schedule, passes(*costs)).spans
    return max(row[-1].end_s - row[0].start_s - sum(s.end_s - s.start_s for s in row) for row in spans)


# ZB-H1, ZB-H2 and Seq1F1B with zero bubble


@pytest.mark.parametrize("costs", [(1, 1, 1), (10, 12, 8), (3, 4, 2), (1, 3, 1)])
@pytest.mark.parametrize(
    ("p", "m", "k"), [(1, 2, 1), (2, 4, 1), (3, 3, 1), (4, 8, 1), (8, 16, 1), (4, 2, 3), (4, 4, 2), (4, 8, 4)]
)
def test_the_bubble_and_peak_of_a_late_w(p: int, m: int, k: int, costs: tuple[int, int, int]) -> None:
    """(p-1)(f+b-2w)/k with b = i + w, where f >= w and i >= w; p-1+k segments kept on every rank."""
    f, i, w = costs
    schedule = build("seq1f1b_zb", p, m, segments=k)
    assert makespan(schedule, f, i, w) == m * k * (f + i + w) + (p - 1) * (f + i + w - 2 * w)
    assert peak_kept(schedule) == (min(p - 1 + k, m * k),) * p


def test_zb_h1_takes_27_units() -> None:
    """p=4, m=8, F=I=W=1; p micro-batches on every rank."""
    schedule = build("zb_h1", 4, 8)
    assert makespan(schedule, 1, 1, 1) == 27
    assert peak_kept(schedule) == (4, 4, 4, 4)
    assert schedule == build("seq1f1b_zb", 4, 8, segments=1)


def test_zb_h1_keeps_the_forwards_and_backwards_of_1f1b() -> None:
    ours, theirs = build("zb_h1", 4, 7), build("1f1b", 4, 7)
    for order, other in zip(ours.ranks, theirs.ranks, strict=True):
        whole = [a.sibling(Pass.B) if a.kind is Pass.I else a for a in order if a.kind is not Pass.W]
        assert whole == list(other)


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 8), (8, 16)])
def test_zb_h2_has_no_bubble(p: int, m: int) -> None:
    """p=4, m=8, F=I=W=1: 24 units from a rank's first action to its last; 2p-1 micro-batches on every rank."""
    schedule = build("zb_h2", p, m)
    timeline = simulate_schedule(schedule, UNITS)
    assert longest_span(timeline) == 3 * m
    assert timeline.makespan_s == 3 * m + p - 1
    assert peak_kept(schedule) == (2 * p - 1,) * p
    assert [warm_up(order) for order in schedule.ranks] == [2 * (p - r) - 1 for r in range(p)]


def test_the_first_backward_of_seq1f1b_zb() -> None:
    """p=4, k=2: 5, 4, 3, 2 forwards before the first."""
    assert [warm_up(order) for order in build("seq1f1b_zb", 4, 8, segments=2).ranks] == [5, 4, 3, 2]


# V placement


V_FAMILIES = ["zb_v", "v_half", "v_min", "dualpipe_v"]


@pytest.mark.parametrize("family", V_FAMILIES)
def test_rank_r_holds_stages_r_and_2p_1_r(family: str) -> None:
    for (stage, _), rank in build(family, 4, 8).placement.items():
        assert rank == min(stage, 7 - stage)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 3), (3, 5), (4, 8), (8, 16)])
def test_zb_v_has_no_bubble_when_f_i_and_w_are_one(p: int, m: int) -> None:
    schedule = build("zb_v", p, m)
    assert idle_between(schedule, (1, 1, 1)) == 0
    assert peak_kept(schedule) == (2 * p,) * p


def test_zb_v_at_10_12_8() -> None:
    """p=8, m=16, (F, I, W) = (10, 12, 8): 48 of 960, in the memory of 1F1B."""
    costs = (10, 12, 8)
    schedule = build("zb_v", 8, 16, costs=costs)
    assert 16 * 2 * sum(costs) == 960
    assert idle_between(schedule, costs) == 48
    assert peak_kept(schedule) == (16,) * 8
    # an order that does not know its costs stands still longer
    assert idle_between(build("zb_v", 8, 16), costs) > 48


def test_zb_v_degrades_when_attention_is_most_of_the_work() -> None:
    """I is then 2.5 F and more, and W little: attention has no weights."""
    tables = [(1, 1, 1), (1, 1.5, 0.75), (1, 2, 0.4), (1, 2.3, 0.15)]
    shares = [idle_between(build("zb_v", 8, 16, costs=costs), costs) / (32 * sum(costs)) for costs in tables]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] > 0.15


@pytest.mark.parametrize(
    ("family", "p", "m", "units", "kept"),
    [("v_half", 4, 8, 53, 6), ("v_half", 8, 16, 113, 10), ("v_min", 4, 8, 59, 4), ("v_min", 8, 16, 123, 8)],
)
def test_v_half_and_v_min_with_equal_costs(family: str, p: int, m: int, units: int, kept: int) -> None:
    schedule = build(family, p, m)
    assert makespan(schedule, 1, 1, 1) == units
    assert max(peak_kept(schedule)) == kept


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_v_half_and_v_min_keep_a_half_and_a_third(p: int) -> None:
    """Of 2p half-stages; at most two more for what a block does not divide."""
    assert max(peak_kept(build("v_half", p, 3 * p))) <= p + 2
    assert max(peak_kept(build("v_min", p, 3 * p))) <= 2 * p / 3 + 3


# DualPipeV


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 1, 1), (3, 3, 1)])
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (2, 7), (4, 8), (8, 16), (8, 20)])
def test_the_bubble_and_peak_of_dualpipe_v(p: int, m: int, costs: tuple[int, int, int]) -> None:
    """(p-1)(f+b-2w)/2, where f, b, w are those of two stages and f >= i >= w; 2p+1 half-stages on every rank."""
    f, i, w = costs
    schedule = build("dualpipe_v", p, m)
    table = {Pass.F: f, Pass.B: i + w, Pass.I: i, Pass.W: w}
    timeline = simulate_schedule(schedule, lambda action: table[action.kind])
    assert timeline.makespan_s == 2 * m * (f + i + w) + (p - 1) * (f + i - w)
    assert peak_kept(schedule) == (2 * p + 1,) * p
    assert [warm_up(order) for order in schedule.ranks] == [_phases_1_and_2(p, r) for r in range(p)]


def _phases_1_and_2(p: int, r: int) -> int:
    """Forwards before the first backward; the last rank has one more, of the phase that starts with a pair."""
    return 2 * (p - r - 1) + 2 * (r + 1) + (r == p - 1)


def test_the_phases_of_dualpipe_v() -> None:
    """Rank 1 of 2, m=4: F0 F1 twice, (F0 & B1, F1 & B0) twice, B1 B0 with the second of each split, W twice."""
    schedule = build("dualpipe_v", 2, 4)
    expected = "1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3"
    assert " ".join(map(str, schedule.ranks[1])) == expected


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        (
            "dualpipe_v",
            {"microbatches": 3},
            "schedule.microbatches: 3 do not fill dualpipe_v on 2 ranks; give at least 4, or use zb_v",
        ),
        ("zb_v", {"layers": 3}, "schedule.ranks: 3 layers cannot fill 2 ranks of 2 stages each; use at most 1 rank"),
        ("v_min", {"ranks": 1, "layers": 1}, "schedule.ranks: 1 layer cannot fill 1 rank of 2 stages each; use a model of at least 2 layers"),
        ("zb_v", {"costs": (1, 0, 1)}, "schedule.costs: (1, 0, 1); give three times above 0, of F, I and W of one stage"),
        ("v_half", {"costs": (1, 1)}, "schedule.costs: (1, 1); give three times above 0, of F, I and W of one stage"),
        ("zb_h1", {"ends": (0, -1)}, "schedule.ends: (0, -1); give two weights in layers, for embed and head, from 0 up"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_says_what_can(family: str, given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_schedule(family, **({"ranks": 2, "layers": 4, "microbatches": 4} | given))
    assert str(error.value) == message
