"""Schedules of every family, broken: `check` refuses each break that matters, and what it lets pass runs.

Whether a break matters is judged by values, not by the schedule's own dependencies: an action may run once
every value and gradient it reads has been made, on the rank that holds what its forward kept.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lower import run_like_nccl, shape_of

from helixpipe.errors import ScheduleError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule
from helixpipe.shape import Batch

Orders = list[list[Action]]
TWO_STAGES_A_RANK = ("zb_v", "v_half", "v_min", "dualpipe_v")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Every family, sizes that divide and that do not."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    known = options(family)
    ranks = draw(st.integers(1, 4))
    given: dict[str, Any] = {}
    if "segments" in known:
        given["segments"] = draw(st.integers(1, 4))
    if "stages_per_rank" in known:
        given["stages_per_rank"] = draw(st.integers(1, 3))
    if family == "helix":
        given["folds"] = draw(st.integers(1, 3))
        given["travel"] = draw(st.sampled_from(["none", "qkv", "attention"]))
        given["groups"] = draw(st.sampled_from(["sequential", "forward_first"]))
    stages = ranks * given.get("stages_per_rank", 2 if family in TWO_STAGES_A_RANK else 1)
    layers = draw(st.integers(1 if family == "helix" else stages, stages + 3))
    microbatches = draw(st.integers(2 * ranks if family == "dualpipe_v" else 1, 8))
    return build_schedule(family, ranks=ranks, layers=layers, microbatches=microbatches, **given)


def swap(orders: Orders, chance: Random) -> None:
    rank = chance.choice([r for r, order in enumerate(orders) if order])
    i, j = chance.randrange(len(orders[rank])), chance.randrange(len(orders[rank]))
    orders[rank][i], orders[rank][j] = orders[rank][j], orders[rank][i]


def drop(orders: Orders, chance: Random) -> None:
    order = chance.choice([order for order in orders if order])
    del order[chance.randrange(len(order))]


def repeat(orders: Orders, chance: Random) -> None:
    order = chance.choice([order for order in orders if order])
    chance.choice(orders).append(chance.choice(order))


def move(orders: Orders, chance: Random) -> None:
    order = chance.choice([order for order in orders if order])
    action = order.pop(chance.randrange(len(order)))
    other = chance.choice(orders)
    other.insert(chance.randint(0, len(other)), action)


def reverse_segments(orders: Orders, chance: Random) -> None:
    """The places of one stage's and micro-batch's segments, taken by the same actions the other way round."""
    rank = chance.choice([r for r, order in enumerate(orders) if order])
    picked = chance.choice(orders[rank])
    places = [i for i, a in enumerate(orders[rank]) if a[:3] == picked[:3]]
    for i, action in zip(places, [orders[rank][i] for i in reversed(places)], strict=True):
        orders[rank][i] = action


BREAKS = [swap, drop, repeat, move, reverse_segments]


def fault(schedule: Schedule, orders: Orders) -> str | None:
    """Why these orders cannot be what `schedule` was, or None: judged by values."""
    placed = Counter(action for order in orders for action in order)
    wanted = Counter(schedule.placed)
    if placed != wanted:
        return "not every action once"
    where = {(action, rank) for rank, order in enumerate(orders) for action in order}
    ranks_of: dict[tuple[int, int], set[int]] = {}
    stage_ranks: dict[int, set[int]] = {}
    for action, rank in where:
        ranks_of.setdefault((action.stage, action.microbatch), set()).add(rank)
        stage_ranks.setdefault(action.stage, set()).add(rank)
    if any(len(ranks) > 1 for ranks in ranks_of.values()):
        return "what a forward kept is on another rank"
    for s, ranks in stage_ranks.items():
        if len(ranks) > 1 and schedule.stages[s].home is None and schedule.stages[s].has_parameters:
            return "parameters on two ranks and no home"
    return None if runs(schedule, orders) else "it stands still"


def runs(schedule: Schedule, orders: Orders) -> bool:
    """Carry the orders out, rank by rank, as far as values, gradients, keys and kept state allow."""
    have: set[tuple[Any, ...]] = set()
    positions = [0] * len(orders)
    readers: dict[Any, list[int]] = {}
    for s, stage in enumerate(schedule.stages):
        for value in stage.reads:
            readers.setdefault(value, []).append(s)

    def needs(action: Action) -> list[tuple[Any, ...]]:
        s, kind, mb, seg = action
        stage = schedule.stages[s]
        made = [value for part in stage.parts for value in part.makes]
        if kind is Pass.F:
            return [("value", v, mb, seg) for v in stage.reads] + [("ran", s, "F", mb, seg - 1)] * (seg > 0)
        if kind is Pass.W:
            return [("ran", s, "I", mb, seg)]
        found: list[tuple[Any, ...]] = [("ran", s, "F", mb, seg)]
        if kind is not Pass.R:
            found += [("gradient", v, reader, mb, seg) for v in made for reader in readers.get(v, [])]
            found += [("ran", s, "back", mb, seg + 1)] * (seg + 1 < schedule.segments)
        return found

    def does(action: Action) -> None:
        s, kind, mb, seg = action
        have.add(("ran", s, str(kind), mb, seg))
        if kind is Pass.F:
            have.update(("value", v, mb, seg) for part in schedule.stages[s].parts for v in part.makes)
        if kind in (Pass.B, Pass.I):
            have.add(("ran", s, "back", mb, seg))
            have.update(("gradient", v, s, mb, seg) for v in schedule.stages[s].reads)

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order) and all(need in have for need in needs(order[positions[rank]])):
                does(order[positions[rank]])
                positions[rank] += 1
                moved = True
    return all(at == len(order) for at, order in zip(positions, orders, strict=True))


def program_of(schedule: Schedule) -> None:
    """Lower it and run it on a transport with NCCL's rules, also where posts block: raises when it deadlocks."""
    lengths = tuple(6 - seg for seg in range(schedule.segments))
    program = lower(schedule, shape_of(schedule.layers), Batch(1, lengths))
    run_like_nccl(program)
    run_like_nccl(program, blocking=True)


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_unbroken_schedule_runs(schedule: Schedule) -> None:
    assert fault(schedule, [list(order) for order in schedule.ranks]) is None
    check(schedule)
    program_of(schedule)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
@settings(max_examples=120, deadline=None)
@given(schedule=schedules(), chance=st.randoms(use_true_random=False))
def test_every_break_that_matters_is_refused(broken: Any, schedule: Schedule, chance: Random) -> None:
    orders = [list(order) for order in schedule.ranks]
    broken(orders, chance)
    changed = Schedule(schedule.stages, tuple(map(tuple, orders)))
    why = fault(schedule, orders)
    if why is None:
        check(changed)
        program_of(changed)
        return
    refusal = None
    try:
        check(changed)
    except ScheduleError as error:
        refusal = str(error)
    if refusal is None:
        # where a whole micro-batch or segment went missing, what is left is a smaller schedule, and it runs
        assert changed.microbatches < schedule.microbatches or changed.segments < schedule.segments, why
        assert fault(changed, orders) is None
        program_of(changed)
    else:
        assert refusal
        assert "\n" not in refusal


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_each_kind_of_break_does_matter_somewhere(broken: Any) -> None:
    """So that the test above cannot pass by breaking nothing."""
    schedule = build_schedule("seq1f1b", ranks=3, layers=3, microbatches=3, segments=3)
    mattered = 0
    for seed in range(30):
        orders = [list(order) for order in schedule.ranks]
        broken(orders, Random(seed))
        mattered += fault(schedule, orders) is not None
    assert mattered > 10
