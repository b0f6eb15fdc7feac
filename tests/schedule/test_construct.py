"""List scheduling: what it draws, that ranks which are full always drain, and that everybody builds the same."""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from helixpipe.errors import ConfigError
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule import construct as module
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.construct import construct
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.schedule import Schedule
from helixpipe.view.text import staircase


def wishes(of_stage: list[int], microbatches: int, segments: int, splits: bool, forward_first: bool = False):
    """Each rank's actions: backwards first or forwards first, W's last."""
    passes = (Pass.F, Pass.I, Pass.W) if splits else (Pass.F, Pass.B)

    def key(action: Action) -> tuple[int, ...]:
        if action.kind in BACKWARD:
            return (0, action.microbatch, -action.stage, -action.segment)
        if action.kind is Pass.W:
            return (2, action.microbatch, action.stage, action.segment)
        return (-1 if forward_first else 1, action.microbatch, action.segment, action.stage)

    found: list[list[Action]] = [[] for _ in range(max(of_stage) + 1)]
    sizes = passes, range(microbatches), range(segments)
    for stage, rank in enumerate(of_stage):
        found[rank] += [Action(stage, kind, mb, seg) for kind, mb, seg in itertools.product(*sizes)]
    return [sorted(own, key=key) for own in found]


def even(stages: int):
    return split_layers(stages, stages)


def test_the_docstring_draws_what_it_builds() -> None:
    drawn = [line.strip() for line in module.__doc__.splitlines() if line.strip().startswith("rank ")]
    made = []
    for limit in (2, 1):
        schedule = construct(even(2), wishes([0, 1], 3, 1, False), lambda action: 1.0, (limit, limit))
        made.append(staircase(schedule).rstrip().splitlines())
    assert drawn == [line for rows in made for line in rows]


@pytest.mark.parametrize("left", [0.3, 1.7])
@pytest.mark.parametrize("placement", [[0, 1, 2], [0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 0], [0], [0, 1, 0, 1, 0, 1]])
def test_ranks_that_are_full_always_drain(placement: list[int], left: float) -> None:
    """Whatever is preferred, costs and bytes differ, and each rank has room for the dearest micro-batch and little more.

    `left`: what an I leaves for its W, of what the forward kept.
    """
    stages, ranks = even(len(placement)), max(placement) + 1
    grid = itertools.product((1, 2, 5), (1, 3), (False, True), (False, True), (0.0, 1.0), (1.0, 1.1, 2.3))
    for number, (m, k, splits, forward_first, patience, room) in enumerate(grid):
        draw = random.Random(number)
        wish = wishes(placement, m, k, splits, forward_first)
        if number % 5 == 0:
            wish = [draw.sample(own, len(own)) for own in wish]
        costs = {action: draw.uniform(0.5, 3) for own in wish for action in own}
        keeps = {(s, mb, seg): draw.uniform(0.5, 2) for s in range(len(stages)) for mb in range(m) for seg in range(k)}

        def kept(forward: Action, keeps: dict = keeps) -> float:
            return keeps[forward.stage, forward.microbatch, forward.segment]

        def put_off(forward: Action, keeps: dict = keeps) -> float:
            return left * kept(forward, keeps)

        of = {(r, mb): 0.0 for r in range(ranks) for mb in range(m)}
        most = dict.fromkeys(of, 0.0)
        for (stage, mb, _), each in keeps.items():
            of[placement[stage], mb] += each
            most[placement[stage], mb] = max(most[placement[stage], mb], each)
        if splits:  # one I at a time may leave more than its forward kept
            of = {key: each + max(0.0, left - 1) * most[key] for key, each in of.items()}
        limits = [room * max(of[r, mb] for mb in range(m)) for r in range(ranks)]
        built = construct(stages, wish, costs.__getitem__, limits, kept=kept, put_off=put_off, patience=patience)
        check(built)
        for rank, order in enumerate(built.ranks):
            live = 0.0
            for action in order:
                forward = action.sibling(Pass.F)
                late = put_off(forward) if splits else 0.0
                live += {Pass.F: kept(forward), Pass.I: late - kept(forward), Pass.B: -kept(forward), Pass.W: -late}[
                    action.kind
                ]
                assert live <= limits[rank] * (1 + 1e-6)


def test_room_for_a_w_is_there_once_and_not_for_each_forward() -> None:
    """An I leaves twice what its forward kept: four forwards and one growth are 5, where room for each from its forward on is 8."""
    wish = wishes([0, 1], 6, 1, True, forward_first=True)
    built = construct(even(2), wish, lambda action: 1.0, (5, 5), put_off=lambda forward: 2.0)
    ahead = 0
    for action in built.ranks[0]:
        if action.kind is not Pass.F:
            break
        ahead += 1
    assert ahead == 4
    with pytest.raises(ConfigError, match=r"^schedule.memory: 1.5, and rank 0 keeps 2 of one micro-batch"):
        construct(even(2), wish, lambda action: 1.0, (1.5, 1.5), put_off=lambda forward: 2.0)


def test_without_a_cap_forwards_run_as_far_ahead_as_they_are_preferred() -> None:
    built = construct(even(2), wishes([0, 1], 4, 1, False, forward_first=True), lambda action: 1.0)
    assert peak_kept(built) == (4, 4)
    capped = construct(even(2), wishes([0, 1], 4, 1, False, forward_first=True), lambda action: 1.0, (2, 2))
    assert peak_kept(capped) == (2, 2)


def test_a_cap_that_holds_no_micro_batch_names_the_rank_and_what_it_misses() -> None:
    with pytest.raises(ConfigError) as error:
        construct(even(2), wishes([0, 1], 2, 3, False), lambda action: 1.0, (3, 2.5))
    assert str(error.value) == (
        "schedule.memory: 2.5, and rank 1 keeps 3 of one micro-batch before its first backward; give at least 3, or more ranks"
    )


def test_a_patient_rank_waits_for_what_it_likes_better() -> None:
    """It does not begin a W of 1.5 where an I or F comes within half of that."""
    takes = {Pass.F: 1.0, Pass.I: 1.0, Pass.W: 1.5}

    def step(patience: float) -> float:
        wish = wishes([0, 1, 2, 3], 6, 1, True)
        built = construct(
            even(4), wish, lambda a: takes[a.kind], (4,) * 4, put_off=lambda forward: 0.5, patience=patience
        )
        return simulate_schedule(built, lambda a: takes[a.kind]).makespan_s

    assert (step(0.0), step(0.5)) == (25.5, 24.5)


def test_messages_that_take_time_are_waited_for() -> None:
    """With messages of 5, rank 1 has no forward before 6; with free ones its second follows its first."""

    def starts(travel) -> list[Action]:
        return list(construct(even(2), wishes([0, 1], 2, 1, False), lambda a: 1.0, travel=travel).ranks[0])

    free, slow = starts(None), starts(lambda made, read: 5.0)
    assert free[:2] == slow[:2] == [Action(0, Pass.F, 0), Action(0, Pass.F, 1)]
    three = wishes([0, 1], 6, 1, False)
    ahead = {
        t: construct(even(2), three, lambda a: 1.0, travel=(lambda made, read, t=t: t)).ranks[0] for t in (0.0, 2.0)
    }

    def before_first_backward(order) -> int:
        return next(i for i, action in enumerate(order) if action.kind is Pass.B)

    assert before_first_backward(ahead[2.0]) > before_first_backward(ahead[0.0])


def test_the_same_order_whatever_the_unit_and_in_another_process() -> None:
    """Costs in seconds or in FLOPs, and with the noise of another machine's last digit."""
    draw = random.Random(3)
    wish = wishes([0, 1, 2, 0, 1, 2], 4, 2, True)
    costs = {action: draw.uniform(1, 2) for own in wish for action in own}
    first = construct(even(6), wish, costs.__getitem__, (9, 9, 9))
    for factor in (1e-3, 3e14):
        again = construct(even(6), wish, lambda a, f=factor: costs[a] * f * (1 + sys.float_info.epsilon), (9, 9, 9))
        assert again == first


def test_linear_in_the_actions() -> None:
    """The clock is asked of once an action, and twice as many micro-batches take no more than about twice as many steps."""
    asked = 0

    def cost(action: Action) -> float:
        nonlocal asked
        asked += 1
        return 1.0

    wish = wishes([*range(8), *range(8)], 16, 8, False)
    schedule = construct(even(16), wish, cost, (40.0,) * 8)
    assert asked == sum(map(len, schedule.ranks)) == 2 * 16 * 16 * 8
    check(schedule)


def test_segments_of_shards_do_not_wait_for_one_another() -> None:
    from helixpipe.parts.part import chain
    from helixpipe.schedule.stage import Stage

    parts = chain(1, vocabulary_shards=1)
    stages = (Stage(parts[1:-2]), Stage(parts[:1]), Stage(parts[-2:-1]), Stage(parts[-1:]))
    orders = [Action(s, kind, 0, seg) for s in range(4) for kind in (Pass.F, Pass.B) for seg in (0, 1)]
    schedule = Schedule(stages, (tuple(orders),))
    waits = {str(action): {str(need) for need in schedule.dependencies(action)} for action in orders}
    assert waits["0F0.1"] == {"1F0.1", "0F0"}
    assert waits["0B0"] == {"0F0", "2B0", "0B0.1"}
    assert waits["1F0.1"] == set()
    assert waits["1B0"] == {"1F0", "0B0"}
    assert waits["2F0.1"] == {"0F0.1"}
    assert waits["2B0"] == {"2F0", "3B0"}
    assert waits["3F0.1"] == {"2F0.1"}
    assert waits["3B0"] == {"3F0"}
