"""Layers of each stage: by hand, or by cost where layers differ."""

from __future__ import annotations

import itertools

import pytest

from helixpipe.errors import ConfigError
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.families.cut_by_cost import cut_by_cost
from helixpipe.schedule.schedule import Schedule


def layers_of(schedule: Schedule) -> list[int]:
    return [sum(part.kind == "attn" for part in stage.parts) for stage in schedule.stages]


def sums(costs: list[float], counts: list[int], ranks: list[int], ends: tuple[float, float] = (0, 0)) -> list[float]:
    found, at = [0.0] * (max(ranks) + 1), 0
    for stage, count in enumerate(counts):
        found[ranks[stage]] += sum(costs[at : at + count])
        at += count
    found[ranks[0]] += ends[0]
    found[ranks[-1]] += ends[1]
    return found


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"helix"}))
def test_by_hand(family: str) -> None:
    v = 2 if "stages_per_rank" in options(family) or family in ("zb_v", "v_half", "v_min", "dualpipe_v") else 1
    given = {"stages_per_rank": v} if "stages_per_rank" in options(family) else {}
    counts = [3, 2] if v == 1 else [1, 4, 2, 1]
    schedule = build_schedule(family, ranks=2, layers=sum(counts), microbatches=4, layers_per_stage=counts, **given)
    assert layers_of(schedule) == counts
    usual = build_schedule(family, ranks=2, layers=sum(counts), microbatches=4, **given)
    if family != "constructed":
        assert schedule.ranks == usual.ranks


def test_the_ends_may_have_none() -> None:
    schedule = build_schedule("1f1b", ranks=3, layers=4, microbatches=2, layers_per_stage=(0, 4, 0))
    assert [str(stage).split()[0] for stage in schedule.stages] == ["embed", "norm.0", "head.4"]


@pytest.mark.parametrize(
    ("family", "counts", "told"),
    [
        ("1f1b", (4, 5), "4, 5 add up to 9, and the model has 10 layers; give 1 more"),
        ("1f1b", (6, 6), "6, 6 add up to 12, and the model has 10 layers; give 2 fewer"),
        ("1f1b", (4, 3, 3), "4, 3, 3 are of 3 stages, and the schedule has 2; give each one's"),
        (
            "interleaved", (5, 0, 3, 2),
            "5, 0, 3, 2 give stage 1 0; only the first and the last may have none, with embedding or head alone",
        ),
        ("helix", (5, 5), "helix cuts inside layers; leave it out, or use another family"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_named(family: str, counts: tuple[int, ...], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_schedule(family, ranks=2, layers=10, microbatches=2, layers_per_stage=counts)
    assert str(error.value) == f"schedule.layers_per_stage: {told}"


def test_by_cost_the_dearest_rank_is_as_cheap_as_any_cut_makes_it() -> None:
    """Against all cuts, for placements of one and two stages a rank."""
    patterns = ([3, 1, 1, 3, 1, 1, 3, 1], [1, 1, 1, 1, 1, 1, 5, 5], [1.0] * 7, [5, 1, 1, 1, 1, 1, 1])
    for costs, ranks, ends in itertools.product(patterns, ([0, 1, 2], [0, 1, 1, 0], [0, 1, 0, 1]), ((0, 0), (0.5, 4))):
        found = cut_by_cost(costs, ends, ranks)
        assert sum(found) == len(costs)
        every = [
            [b - a for a, b in itertools.pairwise((0, *cuts, len(costs)))]
            for cuts in itertools.combinations(range(1, len(costs)), len(ranks) - 1)
        ]
        best = min(max(sums(costs, each, ranks, ends)) for each in every)
        assert max(sums(costs, found, ranks, ends)) <= best * 1.12, (costs, ranks, ends, found)


def test_one_stage_has_all_layers_however_their_costs_round() -> None:
    assert cut_by_cost((0.985, 0.985, 1.05, 0.985), (0.0, 0.119), [0]) == [4]


def test_layers_that_differ_are_cut_by_what_they_cost() -> None:
    costs = [2.0, 0.5, 0.5, 2.0, 0.5, 0.5]
    for family in ("1f1b", "constructed"):
        schedule = build_schedule(family, ranks=2, layers=6, microbatches=2, layer_costs=costs)
        assert layers_of(schedule) == [3, 3]
    first = build_schedule("1f1b", ranks=2, layers=5, microbatches=2, layer_costs=[4, 1, 1, 1, 1])
    assert layers_of(first) == [1, 4]
