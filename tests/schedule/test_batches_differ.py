"""Programs whose micro-batches differ: messages of each one's own shapes, in an order that no backend deadlocks on."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_breaks import schedules
from test_lower import shape_of
from without_tags import run_like_nccl

from helixpipe.errors import ConfigError
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.simulate import simulate_program
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import flops, lower
from helixpipe.schedule.program import Kind
from helixpipe.schedule.schedule import Schedule

LENGTH = 24
few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def cut(draw: random.Random, segments: int) -> tuple[int, ...]:
    places = sorted(draw.sample(range(1, LENGTH), segments - 1))
    return tuple(b - a for a, b in zip([0, *places], [*places, LENGTH], strict=True))


def batches_of(schedule: Schedule, seed: int, rows: int = 2) -> tuple[Batch, ...]:
    """Some equal, most not."""
    draw = random.Random(seed)
    known = [
        Batch(rows, cut(draw, schedule.segments), tuple(cut(draw, draw.randint(1, 6)) for _ in range(rows)))
        for _ in range(4)
    ]
    return tuple(draw.choice(known) for _ in range(schedule.microbatches))


@few
@given(schedules(), st.integers(0, 10**6))
def test_no_program_of_differing_batches_deadlocks(schedule: Schedule, seed: int) -> None:
    program = lower(schedule, shape_of(schedule.layers, tied=True), batches_of(schedule, seed))
    for blocking in (False, True):
        executed = run_like_nccl(program, blocking)
        assert sorted(executed) == sorted(action for order in schedule.ranks for action in order)


@few
@given(schedules(least_segments=2), st.integers(0, 10**6))
def test_messages_have_the_shapes_of_their_own_micro_batch(schedule: Schedule, seed: int) -> None:
    shape, batches = shape_of(schedule.layers), batches_of(schedule, seed)
    for message in lower(schedule, shape, batches).messages:
        if message.kind in (Kind.VALUES, Kind.GRADIENTS):
            at = message.producer
            assert at is not None
            tokens = batches[at.microbatch].segment_lengths[at.segment]
            assert {shape[:2] for shape in message.shapes} == {(2, tokens)}
            assert all(math.prod(shape[2:]) == 8 for shape in message.shapes)


def test_one_batch_for_all_is_as_many_equal_ones() -> None:
    schedule = build_schedule("seq1f1b", ranks=2, layers=4, microbatches=3, segments=2)
    one, many = (lower(schedule, shape_of(4), given) for given in (Batch(1, (5, 3)), [Batch(1, (5, 3))] * 3))
    assert one.batches == many.batches == (Batch(1, (5, 3)),) * 3
    assert one.alike == many.alike == (0, 0, 0)
    assert [list(map(str, order)) for order in one.ranks] == [list(map(str, order)) for order in many.ranks]
    assert [message.shapes for message in one.messages] == [message.shapes for message in many.messages]


def test_equal_batches_are_priced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = build_schedule("seq1f1b", ranks=2, layers=4, microbatches=6, segments=2)
    asked: Counter[tuple[str, Batch, int]] = Counter()
    forward = ModelShape.forward_flops

    def counted(self: ModelShape, part: object, batch: Batch, segment: int) -> float:
        asked[str(self.alike(part)), batch, segment] += 1  # type: ignore[arg-type]
        return forward(self, part, batch, segment)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelShape, "forward_flops", counted)
    a, b = Batch(1, (12, 12)), Batch(1, (12, 12), ((20, 4),))
    lower(schedule, shape_of(4), [a, b, Batch(1, (12, 12)), b, a, b])
    assert set(asked.values()) == {1}
    assert {batch for _, batch, _ in asked} == {a, b}


def test_flops_are_of_each_micro_batch_by_itself() -> None:
    schedule = build_schedule("zb_h1", ranks=2, layers=2, microbatches=3)
    batches = [Batch(1, (24,)), Batch(1, (24,), ((12, 12),)), Batch(1, (24,), ((1,) * 24,))]
    together = flops(schedule, shape_of(2), batches)
    for mb, batch in enumerate(batches):
        alone = flops(schedule, shape_of(2), batch)
        for kind in (Pass.F, Pass.I, Pass.W):
            assert together(Action(0, kind, mb)) == alone(Action(0, kind, 0))
    assert together(Action(0, Pass.F, 0)) > together(Action(0, Pass.F, 1)) > together(Action(0, Pass.F, 2))


def finished(schedule: Schedule, seconds: dict[Action, float]) -> float:
    """When the last action ends, by events: whoever is first among all that could start starts."""
    waits = {a: set(schedule.dependencies(a)) for order in schedule.ranks for a in order}
    at, free, done, events = (
        [0] * len(schedule.ranks),
        [True] * len(schedule.ranks),
        set(),
        [(0.0, -1, Action(0, Pass.F, 0))],
    )
    now = 0.0
    while events:
        now, rank, action = heapq.heappop(events)
        if rank >= 0:
            done.add(action)
            free[rank] = True
        if events and events[0][0] == now:
            continue
        for r, order in enumerate(schedule.ranks):
            if free[r] and at[r] < len(order) and waits[order[at[r]]] <= done:
                heapq.heappush(events, (now + seconds[order[at[r]]], r, order[at[r]]))
                at[r], free[r] = at[r] + 1, False
    assert len(done) == len(waits)
    return now


@few
@given(schedules(), st.integers(0, 10**6))
def test_a_program_of_differing_batches_takes_what_an_event_queue_says(schedule: Schedule, seed: int) -> None:
    shape, batches = shape_of(schedule.layers), batches_of(schedule, seed)
    by_flops = flops(schedule, shape, batches)
    seconds = {action: float(int(by_flops(action))) for order in schedule.ranks for action in order}
    timeline = simulate_program(lower(schedule, shape, batches), seconds.__getitem__)
    assert timeline.makespan_s == finished(schedule, seconds)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([Batch(1, (4, 4))] * 2, r"^batches: 2, and the schedule has 3 micro-batches; give one for all, or of each its own$"),
        ([Batch(1, (4, 4))] * 2 + [Batch(1, (8,))], r"^schedule\.segments: the schedule has 2 segments and the batch 1$"),
        (
            [Batch(1, (4, 4))] * 2 + [Batch(2, (4, 5))],
            r"^batches: micro-batches of different sequences, 1 of 8 tokens, 2 of 9 tokens; give all as many of one length$",
        ),
    ],
)  # fmt: skip
def test_batches_that_are_not_the_schedules_are_refused(batches: list[Batch], said: str) -> None:
    schedule = build_schedule("seq1f1b", ranks=2, layers=2, microbatches=3, segments=2)
    with pytest.raises(ConfigError, match=said):
        lower(schedule, shape_of(2), batches)
