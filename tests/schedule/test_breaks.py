"""Schedules of every family, broken: `check` refuses each break that matters, and what it lets pass runs.

Whether a break matters is judged by values, not by the schedule's own dependencies: an action may run once
every value and gradient it reads has been made, on the rank that holds what its forward kept.
"""

from __future__ import annotations

import re
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lower import shape_of
from without_tags import run_like_nccl

from helixpipe.errors import ScheduleError
from helixpipe.parts.work import Batch
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule

Orders = list[list[Action]]
TWO_STAGES_A_RANK = ("zb_v", "v_half", "v_min", "dualpipe_v")


@st.composite
def schedules(draw: st.DrawFn, family: str = "", least_segments: int = 1) -> Schedule:
    """Sizes that divide and that do not; "" is any family."""
    family = family or draw(st.sampled_from(sorted(FAMILIES)))
    known = options(family)
    ranks = draw(st.integers(1, 4))
    given: dict[str, Any] = {}
    if "segments" in known:
        given["segments"] = draw(st.integers(least_segments, 4))
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


# Each break changes the orders and returns the actions it touched.


def swap(orders: Orders, chance: Random) -> list[Action]:
    order = chance.choice([order for order in orders if order])
    i, j = chance.sample(range(len(order)), 2)
    order[i], order[j] = order[j], order[i]
    return [order[i], order[j]]


def drop(orders: Orders, chance: Random) -> list[Action]:
    order = chance.choice([order for order in orders if order])
    return [order.pop(chance.randrange(len(order)))]


def repeat(orders: Orders, chance: Random) -> list[Action]:
    order = chance.choice([order for order in orders if order])
    action = chance.choice(order)
    chance.choice(orders).append(action)
    return [action]


def move(orders: Orders, chance: Random) -> list[Action]:
    order = chance.choice([order for order in orders if order])
    action = order.pop(chance.randrange(len(order)))
    other = chance.choice(orders)
    other.insert(chance.randint(0, len(other)), action)
    return [action]


def move_microbatch(orders: Orders, chance: Random) -> list[Action]:
    """All that one stage does with one micro-batch, in its order."""
    order = chance.choice([order for order in orders if order])
    picked = chance.choice(order)
    moved = [a for a in order if (a.stage, a.microbatch) == (picked.stage, picked.microbatch)]
    order[:] = [a for a in order if a not in moved]
    other = chance.choice(orders)
    places = sorted(chance.randint(0, len(other)) for _ in moved)
    for behind, (place, action) in enumerate(zip(places, moved, strict=True)):
        other.insert(place + behind, action)
    return moved


def reverse_segments(orders: Orders, chance: Random) -> list[Action]:
    """The places of one stage's and micro-batch's segments, taken by the same actions the other way round."""
    rank = chance.choice([r for r, order in enumerate(orders) if order])
    picked = chance.choice(orders[rank])
    places = [i for i, a in enumerate(orders[rank]) if a[:3] == picked[:3]]
    touched = [orders[rank][i] for i in places]
    for i, action in zip(places, reversed(touched), strict=True):
        orders[rank][i] = action
    return touched


BREAKS = [swap, drop, repeat, move, move_microbatch, reverse_segments]
PAIRS = [
    (f, broken)
    for f in sorted(FAMILIES)
    for broken in BREAKS
    if broken is not reverse_segments or "segments" in options(f)
]

ONCE, KEPT, HOMELESS, STUCK = (
    "not every action once", "what a forward kept is on another rank", "parameters on two ranks and no home",
    "it stands still",
)  # fmt: skip
# what check says of each, one of these
WORDS = {
    ONCE: ("missing: ", "duplicated: it is also on rank "),
    KEPT: ("; all passes and segments of one micro-batch share what its forward kept, so put them on one rank",),
    HOMELESS: (" has parameters and runs on ranks ",),
    STUCK: ("deadlock: rank ", ", which comes later on the same rank, at position "),
}


def fault(schedule: Schedule, orders: Orders) -> str | None:
    """Why these orders cannot be what `schedule` was, or None: judged by values."""
    placed = Counter(action for order in orders for action in order)
    wanted = Counter(schedule.placed)
    if placed != wanted:
        return ONCE
    where = {(action, rank) for rank, order in enumerate(orders) for action in order}
    ranks_of: dict[tuple[int, int], set[int]] = {}
    stage_ranks: dict[int, set[int]] = {}
    for action, rank in where:
        ranks_of.setdefault((action.stage, action.microbatch), set()).add(rank)
        stage_ranks.setdefault(action.stage, set()).add(rank)
    if any(len(ranks) > 1 for ranks in ranks_of.values()):
        return KEPT
    for s, ranks in stage_ranks.items():
        if len(ranks) > 1 and schedule.stages[s].home is None and schedule.stages[s].has_parameters:
            return HOMELESS
    return None if runs(schedule, orders) else STUCK


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


@pytest.mark.parametrize(("family", "broken"), PAIRS, ids=lambda value: getattr(value, "__name__", value))
@settings(max_examples=40, deadline=None)
@given(data=st.data(), chance=st.randoms(use_true_random=False))
def test_every_break_that_matters_is_refused(family: str, broken: Any, data: st.DataObject, chance: Random) -> None:
    schedule = data.draw(schedules(family, 2 if broken is reverse_segments else 1))
    orders = [list(order) for order in schedule.ranks]
    touched = broken(orders, chance)
    changed = Schedule(schedule.stages, tuple(map(tuple, orders)))
    why = fault(schedule, orders)
    if why is None:
        check(changed)
        program_of(changed)
        return
    with pytest.raises(ScheduleError) as refusal:
        check(changed)
    fits(refusal.value, why, broken, touched)


def fits(refusal: ScheduleError, why: str, broken: Any, touched: list[Action]) -> None:
    """It says what is wrong, and names an action that was touched: only their order or place can be at fault."""
    text = str(refusal)
    assert "\n" not in text
    assert any(words in text for words in WORDS[why]), (why, text)
    named = {Action.parse(found) for found in re.findall(r"\b\d+[FBIWR]\d+(?:\.\d+)?\b", text)}
    if broken is drop:
        # without its I a forward has no backward, and that is what is told: no B
        wanted = touched[0].sibling(Pass.B) if touched[0].kind is Pass.I else touched[0]
        assert refusal.action == str(wanted)
        assert refusal.reason.startswith("missing: ")
    elif broken is repeat:
        assert refusal.action == str(touched[0])
        assert refusal.reason.startswith("duplicated: ")
    elif why == HOMELESS:  # any action of the stage
        assert refusal.reason.startswith(f"stage {touched[0].stage} (")
    else:
        assert named & set(touched), text


@pytest.mark.parametrize(
    ("broken", "reasons"),
    [
        (swap, {STUCK}),
        (drop, {ONCE}),
        (repeat, {ONCE}),
        (move, {KEPT, STUCK}),
        (move_microbatch, {HOMELESS, STUCK}),
        (reverse_segments, {STUCK}),
    ],
)
def test_each_kind_of_break_does_matter_somewhere(broken: Any, reasons: set[str]) -> None:
    """So that the test above cannot pass by breaking nothing, and reads every reason."""
    schedule = build_schedule("seq1f1b", ranks=3, layers=3, microbatches=3, segments=3)
    mattered: list[str] = []
    for seed in range(30):
        orders = [list(order) for order in schedule.ranks]
        broken(orders, Random(seed))
        mattered += filter(None, [fault(schedule, orders)])
    assert len(mattered) > 10
    assert set(mattered) == reasons
