"""Why ranks stand idle, and which chain of actions decides the step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.explain import Reason, critical_path, idle, idle_by_reason
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.timeline import Span, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program


def program_of(family: str, ranks: int, layers: int, microbatches: int, **options: object) -> Program:
    schedule = build_schedule(family, ranks=ranks, layers=layers, microbatches=microbatches, **options)
    shape = ModelShape(layers=layers, hidden=4, heads=1, ffn=4, vocabulary=5)
    return lower(schedule, shape, Batch(1, (2,) * schedule.segments))


def test_every_reason_in_one_small_step() -> None:
    """Two ranks, one micro-batch, F=2, B=3, a message takes 10.

    rank 0  F..........................B          2 to 14: rank 1 waits (warm-up); 14 to 17 rank 1 runs B,
    rank 1  ............F B                       which rank 0 waits for (imbalance), then 10 for its message
    """
    program = program_of("1f1b", 2, 2, 1)
    timeline = simulate_program(program, lambda a: 2.0 if a.kind is Pass.F else 3.0, lambda message: 10.0)
    first, second = idle(program, timeline)
    told = "x.1 of 1B0 from rank 1 to rank 0"
    assert [tuple(each) for each in first] == [
        (0, 2.0, 17.0, Reason.IMBALANCE, 1, told), (0, 17.0, 27.0, Reason.MESSAGE, 1, told),
    ]  # fmt: skip
    assert [tuple(each) for each in second] == [
        (1, 0.0, 12.0, Reason.WARM_UP, -1, ""), (1, 17.0, 30.0, Reason.DRAIN, -1, ""),
    ]  # fmt: skip
    sums = idle_by_reason(program, timeline)
    assert sums[0] == {"warm_up": 0, "drain": 0, "imbalance": 15, "shards": 0, "message": 10, "runtime": 0}
    path = critical_path(program, timeline)
    assert [(step.rank, str(step.span.action)) for step in path] == [(0, "0F0"), (1, "1F0"), (1, "1B0"), (0, "0B0")]
    assert [step.waited_s for step in path] == [0, 12, 0, 25]


def test_every_reason_where_the_vocabulary_is_spread() -> None:
    """Rows that were looked up at the start, and their gradients at the end, are neither a warm-up's end nor a drain's.

    F of a look-up 1, of layers 2, of logits 3 on rank 0 and 1 on rank 1; B one more; the loss 1 each; a message takes 10.

    rank 0  L..........F......................lll......................llll.......................BBB LL
    rank 1  L......................F l......................joins l......................BBB .......... LL
    """
    program = program_of("1f1b", 2, 2, 1, vocabulary="spread")
    assert [" ".join(map(str, order)) for order in program.schedule.ranks] == [
        "2F0 0F0 4F0 4B0 0B0 2B0", "3F0 1F0 5F0 6F0 6B0 5B0 1B0 3B0",
    ]  # fmt: skip
    takes = {2: 1.0, 3: 1.0, 0: 2.0, 1: 2.0, 4: 3.0, 5: 1.0}
    timeline = simulate_program(
        program, lambda a: 1.0 if a.stage == 6 else takes[a.stage] + (a.kind is Pass.B), lambda message: 10.0
    )
    first, second = idle_by_reason(program, timeline)
    assert first == {"warm_up": 10, "drain": 10, "imbalance": 12 + 13, "shards": 12, "message": 30, "runtime": 0}
    assert second == {"warm_up": 22, "drain": 23, "imbalance": 0, "shards": 12 + 12, "message": 20, "runtime": 0}
    told = {(each.reason, each.source, each.awaited.split(" from ")[0]) for each in idle(program, timeline)[1]}
    assert (Reason.SHARDS, 0, "scores.2.0/2 of 4F0") in told


def test_what_the_runtime_takes_between_two_actions() -> None:
    """Measured: a gap before an action that waited for nothing."""
    program = program_of("gpipe", 1, 1, 2)
    names = ("0F0", "0F1", "0B0", "0B1")
    spans = tuple(Span(Action.parse(name), 1.0 + 2 * i, 2.5 + 2 * i) for i, name in enumerate(names))
    (found,) = idle_by_reason(program, Timeline((spans,)))
    assert found == {
        "warm_up": 1.0,
        "drain": 0,
        "imbalance": 0,
        "shards": 0,
        "message": 0,
        "runtime": pytest.approx(1.5),
    }


@settings(max_examples=40)
@given(
    st.sampled_from(
        ["1f1b", "gpipe", "helix", "helix, weights travel", "seq1f1b", "zb_h1", "interleaved", "seq1f1b, spread"]
    ),
    st.integers(1, 4), st.integers(1, 6), st.floats(0, 3),
)  # fmt: skip
def test_the_parts_add_up(family: str, ranks: int, microbatches: int, travels: float) -> None:
    options = {
        "seq1f1b": {"segments": 2}, "interleaved": {"stages_per_rank": 2}, "helix, weights travel": {"travel": "attention"},
        "seq1f1b, spread": {"segments": 2, "vocabulary": "spread"},
    }.get(family, {})  # fmt: skip
    program = program_of(family.split(",")[0], ranks, 2 * ranks, microbatches, **options)
    timeline = simulate_program(program, lambda a: 1.0 + (a.kind is Pass.B), lambda message: travels)
    for rank, whiles in enumerate(idle(program, timeline)):
        assert math.fsum(each.seconds for each in whiles) == pytest.approx(timeline.idle_s[rank], abs=1e-9)
        assert all(each.seconds > 0 for each in whiles)
        assert all(each.reason != "runtime" for each in whiles), "nothing predicted waits for nothing"
        assert all(
            each.source not in (-1, rank) for each in whiles if each.reason in ("imbalance", "shards", "message")
        )
    path = critical_path(program, timeline)
    assert path[0].span.start_s == 0
    assert path[-1].span.end_s == timeline.makespan_s
    for before, step in itertools.pairwise(path):
        assert before.span.end_s <= step.span.start_s + 1e-9
    ran = math.fsum(step.span.end_s - step.span.start_s for step in path)
    assert ran <= timeline.makespan_s + 1e-9
    if travels == 0:  # nothing but work is on it
        assert ran == pytest.approx(timeline.makespan_s)
