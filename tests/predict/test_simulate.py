"""The simulated clock and what can be asked of a timeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_program, simulate_schedule
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Kind, Program, Receive, Run
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.text import from_csv


def program_of(schedule: Schedule, **changes: object) -> Program:
    sizes = {"layers": schedule.layers, "hidden": 4, "heads": 1, "ffn": 4, "vocabulary": 5}
    return lower(schedule, ModelShape(**{**sizes, **changes}), Batch(1, (2,) * schedule.segments), lambda action: 1.0)


def test_a_message_travels_once_both_ranks_have_posted_it() -> None:
    """Two ranks, one micro-batch, F=2, B=3, a message takes 10: 2+10+2+3+10+3."""
    program = program_of(build_schedule("1f1b", ranks=2, layers=2, microbatches=1))
    timeline = simulate_program(program, lambda a: 2.0 if a.kind is Pass.F else 3.0, lambda message: 10.0)
    assert timeline.spans == (
        (
            Span(Action(0, Pass.F, 0), 0, 2),
            Span(Action(0, Pass.B, 0), 27, 30, "x.1 of 1B0 from rank 1 to rank 0"),
        ),
        (
            Span(Action(1, Pass.F, 0), 12, 14, "x.1 of 0F0 from rank 0 to rank 1"),
            Span(Action(1, Pass.B, 0), 14, 17),
        ),
    )
    assert timeline.makespan_s == 30
    assert timeline.busy_s == (5, 5)
    assert timeline.idle_s == (25, 25)
    assert timeline.bubble_ratio == pytest.approx(50 / 60)


def test_messages_travel_under_actions() -> None:
    """Rank 0 runs on while its messages travel; rank 1 waits for the first and has the others in time."""
    program = program_of(build_schedule("gpipe", ranks=2, layers=2, microbatches=3))
    timeline = simulate_program(program, lambda action: 1.0, lambda message: 1.0)
    assert [(s.start_s, s.end_s) for s in timeline.spans[0][:3]] == [(0, 1), (1, 2), (2, 3)]
    assert [(s.start_s, s.end_s) for s in timeline.spans[1][:3]] == [(2, 3), (3, 4), (4, 5)]
    assert [bool(span.awaited) for span in timeline.spans[1]] == [True, False, False, False, False, False]


def test_weight_gradients_that_travel_may_come_home_after_all_actions() -> None:
    schedule = build_schedule("helix", ranks=2, layers=2, microbatches=4, travel="attention")
    program = program_of(schedule)
    left = [m.producer for m in program.messages if m.kind is Kind.WEIGHT_GRADIENTS]
    slow = simulate_program(program, lambda a: 1.0, lambda m: 50.0 if m.kind is Kind.WEIGHT_GRADIENTS else 0.0)
    assert slow.settled_s >= 50 + max(s.end_s for row in slow.spans for s in row if s.action in left)
    free = simulate_program(program, lambda action: 1.0)
    assert free.settled_s <= free.makespan_s


def test_what_an_action_waited_for_is_the_last_of_its_messages() -> None:
    program = program_of(build_schedule("helix", ranks=2, layers=1, microbatches=1, folds=1))
    timeline = simulate_program(program, lambda action: 1.0, lambda m: {"x.0": 50.0}.get(m.names[0], 1.0))
    waited = {str(span.action): span.awaited for spans in timeline.spans for span in spans if span.awaited}
    assert waited["1F0"] == "q.0 k.0 v.0 of 0F0 from rank 0 to rank 1"
    assert waited["2F0"] == "x.0 of 0F0 from rank 0 to rank 1"  # o is made on this rank; x comes the long way
    assert waited["0B0"] == "q.0 k.0 v.0 of 1B0 from rank 1 to rank 0"  # it left behind x.0, on the same link


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["none", "qkv", "attention"]), st.floats(0, 5))
def test_messages_that_take_longer_never_end_a_step_sooner(p: int, m: int, travel: str, longer: float) -> None:
    schedule = build_schedule("helix", ranks=p, layers=p, microbatches=m, travel=travel)
    program = program_of(schedule, tied=True)
    free = simulate_program(program, lambda action: 1.0).makespan_s
    taxed = simulate_program(program, lambda action: 1.0, lambda message: longer).makespan_s
    assert taxed >= free == simulate_schedule(schedule, lambda action: 1.0).makespan_s
    weights = sum(message.kind in (Kind.WEIGHTS, Kind.WEIGHT_GRADIENTS) for message in program.messages)
    assert bool(weights) == (p > 1 and (travel != "none" or _head_is_elsewhere(schedule)))


def _head_is_elsewhere(schedule: Schedule) -> bool:
    return schedule.owner(0) != schedule.owner(len(schedule.stages) - 1)


def test_a_program_that_cannot_go_on_is_named() -> None:
    program = program_of(build_schedule("1f1b", ranks=2, layers=2, microbatches=1))
    posts = tuple(i for i in program.ranks[1] if not isinstance(i, Receive))
    broken = replace(program, ranks=(program.ranks[0], posts))
    with pytest.raises(RuntimeError, match=r"^rank 0 never gets past "):
        simulate_program(broken, lambda action: 1.0)


def test_actions_start_when_rank_and_dependencies_are_free() -> None:
    schedule = from_csv(
        "# stage 0: embed norm.0 qkv.0 attn.0 proj.0 mlp.0\n# stage 1: norm.1 qkv.1 attn.1 proj.1 mlp.1 head.2\n"
        "0F0,0F1,0I0,0W0,0B1\n1F0,1B0,1F1,1R1,1I1,1W1\n"
    )
    lengths = {Pass.F: 1, Pass.B: 4, Pass.I: 2, Pass.W: 2, Pass.R: 1}
    timeline = simulate_schedule(schedule, lambda action: lengths[action.kind])
    assert [[(str(s.action), s.start_s, s.end_s) for s in spans] for spans in timeline.spans] == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0I0", 6, 8), ("0W0", 8, 10), ("0B1", 10, 14)],
        [("1F0", 1, 2), ("1B0", 2, 6), ("1F1", 6, 7), ("1R1", 7, 8), ("1I1", 8, 10), ("1W1", 10, 12)],
    ]
    assert timeline.order == schedule.ranks


def test_an_empty_timeline_has_answers_too() -> None:
    timeline = Timeline(((), ()))
    assert (timeline.makespan_s, timeline.bubble_ratio, timeline.ranks) == (0.0, 0.0, 2)
    assert timeline.idle_s == (0.0, 0.0)
    assert timeline.peak_kept_bytes == ()


def test_peak_bytes_are_of_activations_by_rank() -> None:
    points = (MemoryPoint(0, 5), MemoryPoint(1, 9, 100), MemoryPoint(2, 0))
    assert Timeline(((), ()), (points, ())).peak_kept_bytes == (9, 0)


def test_only_runs_are_spans() -> None:
    program = program_of(build_schedule("helix", ranks=3, layers=3, microbatches=3, travel="qkv"))
    timeline = simulate_program(program, lambda action: 1.0, lambda message: 0.5)
    runs = tuple(tuple(i.action for i in rank if isinstance(i, Run)) for rank in program.ranks)
    assert timeline.order == runs


# What forwards keep


@pytest.mark.parametrize("m", [1, 3, 4, 9])
def test_forwards_kept_by_the_families(m: int) -> None:
    p = 4
    assert peak_kept(build_schedule("gpipe", ranks=p, layers=p, microbatches=m)) == (m,) * p
    assert peak_kept(build_schedule("1f1b", ranks=p, layers=p, microbatches=m)) == tuple(
        min(p - r, m) for r in range(p)
    )


def test_helix_keeps_a_group_and_forward_first_all_groups() -> None:
    """Every rank keeps its share of the group: attention and blocks of L/p layers for each micro-batch."""
    given = {"ranks": 4, "layers": 8, "microbatches": 16, "folds": 2}

    def attentions(groups: str) -> tuple[float, ...]:
        return peak_kept(build_schedule("helix", **given, groups=groups), lambda stage: stage % 2)

    assert attentions("sequential") == (8 * 8 / 4,) * 4
    assert attentions("forward_first") == (16 * 8 / 4,) * 4


def test_a_weight_gradient_still_needs_what_was_kept() -> None:
    stage = "# stage 0: embed block.0 head.1\n"
    assert peak_kept(from_csv(stage + "0F0,0I0,0F1,0I1,0W0,0W1\n")) == (2,)
    assert peak_kept(from_csv(stage + "0F0,0I0,0W0,0F1,0I1,0W1\n")) == (1,)
    assert peak_kept(from_csv(stage + "0F0,0R0,0B0,0F1,0B1\n")) == (1,)


def test_a_message_takes_its_ends_own_processor_from_their_actions() -> None:
    """Rank 0 sends three values while it computes; rank 1 waits for the first, which is free there."""
    program = program_of(build_schedule("gpipe", ranks=2, layers=2, microbatches=3))
    messages: dict[str, Any] = {"message_seconds": lambda message: 1.0, "host_seconds": lambda message: 0.25}
    timeline = simulate_program(program, lambda action: 1.0, **messages)
    first, second = ([(s.start_s, s.end_s) for s in spans[:4]] for spans in timeline.spans)
    assert first[:3] == [(0, 1), (1, 2.25), (2.25, 3.5)]
    # the first value came in a wait; the second left at 2.25 and came at 3.25, when rank 1 had waited since 3
    assert second[:2] == [(2, 3), (3.25, 4.25 + 0.75 * 0.25)]


def test_a_processor_that_carries_nothing_changes_nothing() -> None:
    program = program_of(build_schedule("1f1b", ranks=3, layers=3, microbatches=4))
    costs = lambda action: 1.0, lambda message: 0.5
    assert simulate_program(program, *costs, host_seconds=lambda message: 0.0) == simulate_program(program, *costs)
