"""Lowering: what is sent, when it is posted, and that no program can deadlock, on any backend."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from without_tags import Deadlock, Mismatch, run_like_nccl

from helixpipe.errors import ConfigError
from helixpipe.parts.part import chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch
from helixpipe.predict.simulate import simulate_program, simulate_schedule
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import flops, lower
from helixpipe.schedule.program import Accumulate, Kind, Message, Program, Receive, Run, Send, parameter_owners
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage


def shape_of(layers: int, **changes: object) -> ModelShape:
    return ModelShape(**{"layers": layers, "hidden": 8, "heads": 2, "ffn": 16, "vocabulary": 11, **changes})


@st.composite
def family_schedules(draw: st.DrawFn) -> Schedule:
    """Any family with any option, at sizes that divide and that do not."""
    family = draw(st.sampled_from(["gpipe", "1f1b", "helix"]))
    ranks, microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    layers = draw(st.integers(1 if family == "helix" else ranks, 9))
    options = {}
    if family == "helix":
        options = {
            "folds": draw(st.integers(1, 3)),
            "travel": draw(st.sampled_from(["none", "qkv", "attention"])),
            "groups": draw(st.sampled_from(["sequential", "forward_first"])),
        }
    return build_schedule(family, ranks=ranks, layers=layers, microbatches=microbatches, **options)


@st.composite
def any_schedules(draw: st.DrawFn) -> Schedule:
    """Schedules that no family would make: random cuts, placement, order, segments, split backwards, recomputes."""
    layers, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    microbatches, segments = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    chance = draw(st.randoms(use_true_random=False))
    cuts = [part for part in chain(layers)[1:] if chance.random() < 0.5]
    pieces: list[list] = [[]]
    for part in chain(layers):
        pieces += [[]] if part in cuts else []
        pieces[-1].append(part)
    wander = [chance.random() < 0.5 for _ in pieces]
    base = [chance.randrange(ranks) for _ in pieces]
    stages = tuple(
        Stage(tuple(parts), home=chance.randrange(ranks) if wander[s] else None) for s, parts in enumerate(pieces)
    )
    rank_of = {
        (s, mb): chance.randrange(ranks) if wander[s] else base[s]
        for s in range(len(stages))
        for mb in range(microbatches)
    }
    actions = set()
    for s in range(len(stages)):
        for mb in range(microbatches):
            for seg in range(segments):
                kinds = [Pass.F, *chance.choice([[Pass.B], [Pass.I, Pass.W]]), *chance.choice([[], [Pass.R]])]
                actions |= {Action(s, kind, mb, seg) for kind in kinds}
    return _ordered(stages, ranks, rank_of, actions, chance)


def _ordered(
    stages: tuple[Stage, ...], ranks: int, rank_of: dict, actions: set[Action], chance: random.Random
) -> Schedule:
    """Put the actions into an order that can be carried out, by carrying them out in some order."""
    by_rank = tuple(
        tuple(sorted(a for a in actions if rank_of[a.stage, a.microbatch] == rank)) for rank in range(ranks)
    )
    known = Schedule(stages, by_rank)
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    left = sorted(actions)
    while left:
        free = []
        for action in left:
            needs = set(known.dependencies(action))
            if action.kind in (Pass.B, Pass.I):
                needs |= {again for again in [action.sibling(Pass.R)] if again in actions}
            if needs <= done:
                free.append(action)
        action = chance.choice(free)
        done.add(action)
        left.remove(action)
        orders[rank_of[action.stage, action.microbatch]].append(action)
    return Schedule(stages, tuple(map(tuple, orders)))


def lowered(schedule: Schedule, tied: bool = False, seed: int | None = None) -> Program:
    """Lowered with messages ordered by FLOPs, or by random durations of which many are the same or zero."""
    chance = random.Random(seed)
    table = {action: chance.choice([0, 0, 1, 1, 2, 9]) for order in schedule.ranks for action in order}
    lengths = tuple(5 - seg for seg in range(schedule.segments))
    shape = shape_of(schedule.layers, tied=tied)
    return lower(schedule, shape, Batch(2, lengths), None if seed is None else table.__getitem__)


seeds = st.none() | st.integers(0, 10**6)
few = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@few
@given(st.one_of(family_schedules(), any_schedules()), st.booleans(), seeds)
def test_no_program_deadlocks_on_a_backend_without_tags(schedule: Schedule, tied: bool, seed: int | None) -> None:
    check(schedule)
    program = lowered(schedule, tied, seed)
    for blocking in (False, True):
        executed = run_like_nccl(program, blocking)
        assert sorted(executed) == sorted(action for order in schedule.ranks for action in order)


def test_stages_that_take_no_time_beside_others_do_not_deadlock() -> None:
    """Guards against messages ordered by time alone: beside 10^17 FLOPs an embedding's 1 is lost to rounding."""
    schedule = build_schedule("helix", ranks=8, layers=32, microbatches=32, travel="qkv")
    run_like_nccl(lower(schedule, SHAPES["7b"], Batch(1, (131072,))), blocking=True)


@few
@given(st.one_of(family_schedules(), any_schedules()), st.booleans(), seeds)
def test_every_rank_posts_in_one_common_order(schedule: Schedule, tied: bool, seed: int | None) -> None:
    program = lowered(schedule, tied, seed)
    for message in program.messages:
        assert message.src != message.dst
    posts = [[i for i in instructions if isinstance(i, Send | Receive)] for instructions in program.ranks]
    for each in posts:
        assert each == sorted(each, key=lambda i: i.message.number)
    for low in range(len(posts)):
        for high in range(low + 1, len(posts)):
            ours, theirs = _between(posts[low], high), _between(posts[high], low)
            assert [i.message.number for i in ours] == [i.message.number for i in theirs]
            assert all(type(a) is not type(b) for a, b in zip(ours, theirs, strict=True))


def _between(posts: list, other: int) -> list:
    return [i for i in posts if other in (i.message.src, i.message.dst)]


@few
@given(st.one_of(family_schedules(), any_schedules()), st.booleans(), seeds)
def test_every_message_leaves_after_its_producer_and_is_awaited_once(
    schedule: Schedule, tied: bool, seed: int | None
) -> None:
    program = lowered(schedule, tied, seed)
    at = [{i: n for n, i in enumerate(instructions)} for instructions in program.ranks]
    runs = [{i.action: n for n, i in enumerate(rank) if isinstance(i, Run)} for rank in program.ranks]
    sent = {i.message: n for rank in at for i, n in rank.items() if isinstance(i, Send)}
    received = {i.message: n for rank in at for i, n in rank.items() if isinstance(i, Receive)}
    waits: dict[Message, list[int]] = {message: [] for message in program.messages}
    for rank in at:
        for instruction, n in rank.items():
            found = {Run: lambda i: i.waits, Accumulate: lambda i: (i.message,)}.get(type(instruction), lambda i: ())
            for message in found(instruction):
                waits[message].append(n)
    assert set(sent) == set(received) == set(program.messages)
    for message in program.messages:
        if message.producer is not None:
            assert runs[message.src][message.producer] < sent[message]
        (awaited,) = waits[message]
        assert received[message] < awaited
        if message.consumer is not None:
            assert runs[message.dst][message.consumer] == awaited


@few
@given(st.one_of(family_schedules(), any_schedules()))
def test_what_is_sent_is_what_crosses_ranks(schedule: Schedule) -> None:
    program = lowered(schedule)
    expected = set()
    for edge in schedule.edges:
        for mb in range(schedule.microbatches):
            src, dst = schedule.placement[edge.producer, mb], schedule.placement[edge.consumer, mb]
            if src != dst:
                for seg in range(schedule.segments):
                    names = tuple(map(str, edge.values))
                    expected |= {(Kind.VALUES, src, dst, edge.producer, edge.consumer, mb, seg, names)}
                    expected |= {(Kind.GRADIENTS, dst, src, edge.consumer, edge.producer, mb, seg, names)}
    found = [
        (m.kind, m.src, m.dst, m.producer.stage, m.consumer.stage, m.producer.microbatch, m.producer.segment, m.names)
        for m in program.messages
        if m.producer is not None and m.consumer is not None
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected


@few
@given(st.one_of(family_schedules(), any_schedules()), st.booleans())
def test_weights_travel_once_a_rank_and_step_and_their_gradients_come_home(schedule: Schedule, tied: bool) -> None:
    program = lowered(schedule, tied)
    owners = parameter_owners(program.schedule, program.shape)
    there, home = set(), set()
    for message in program.messages:
        if message.kind is Kind.WEIGHTS:
            for name in message.names:
                assert owners[name] == message.src
                assert (name, message.consumer.stage, message.dst) not in there, "sent twice"
                there.add((name, message.consumer.stage, message.dst))
        elif message.kind is Kind.WEIGHT_GRADIENTS:
            last = [a for a in schedule.ranks[message.src] if a.stage == message.producer.stage][-1]
            assert message.producer == last
            home |= {(name, message.producer.stage, message.src) for name in message.names}
    uses = {
        (program.shape.parameter_name(part, name), stage, rank)
        for stage, ranks in enumerate(schedule.ranks_of)
        for rank in ranks
        for part in schedule.stages[stage].parts
        for name in program.shape.parameters(part)
    }
    assert there == home == {use for use in uses if owners[use[0]] != use[2]}


def test_a_tied_table_travels_to_the_head_and_its_gradient_back() -> None:
    schedule = build_schedule("1f1b", ranks=3, layers=3, microbatches=4)
    program = lowered(schedule, tied=True)
    told = [str(m) for m in program.messages if m.kind in (Kind.WEIGHTS, Kind.WEIGHT_GRADIENTS)]
    assert told == [
        "weights for 2F0 from rank 0 to rank 2",
        "weight gradients of 2B3 from rank 2 to rank 0",
    ]
    assert all(
        m.names == ("embed.tokens.weight",) and m.shapes == ((11, 8),) for m in program.messages if "weight" in str(m)
    )
    assert not any("weight" in str(m) for m in lowered(schedule).messages)


def test_the_messages_of_a_helix_layer() -> None:
    """q, k and v there; o and x past it; with attention travelling x there and y back."""
    for travel, expected in {
        "none": {("q.1", "k.1", "v.1"), ("o.1",), ("x.1",)},
        "qkv": {("n.1",), ("o.1",), ("x.1",)},
        "attention": {("x.1",), ("y.1",)},
    }.items():
        program = lowered(build_schedule("helix", ranks=4, layers=3, microbatches=8, travel=travel))
        values = {m.names for m in program.messages if m.kind is Kind.VALUES}
        layer_1 = {names for names in values if all(name.endswith(".1") for name in names)}
        assert layer_1 == expected, travel


@few
@given(st.one_of(family_schedules(), any_schedules()), st.integers(0, 1000))
def test_with_free_messages_a_program_takes_as_long_as_its_schedule(schedule: Schedule, seed: int) -> None:
    durations = random.Random(seed)
    times = {action: durations.randrange(9) for order in schedule.ranks for action in order}
    shape, batch = shape_of(schedule.layers), Batch(1, (4,) * schedule.segments)
    timeline = simulate_program(lower(schedule, shape, batch, times.__getitem__), times.__getitem__)
    assert timeline.order == schedule.ranks
    assert timeline.makespan_s == simulate_schedule(schedule, times.__getitem__).makespan_s


@few
@given(family_schedules())
def test_an_evaluation_runs_the_forwards_alone(schedule: Schedule) -> None:
    forward = schedule.forward_only()
    check(forward, forward_only=True)
    program = lowered(forward, tied=True)
    assert {m.kind for m in program.messages} <= {Kind.VALUES, Kind.WEIGHTS}
    run_like_nccl(program)
    run_like_nccl(program, blocking=True)


# The tests above would not notice a wrong order if the transport took any: show that it does not.


def _with_rank(program: Program, rank: int, instructions: list) -> Program:
    return replace(program, ranks=(*program.ranks[:rank], tuple(instructions), *program.ranks[rank + 1 :]))


def test_two_posts_swapped_on_one_rank_do_not_pass() -> None:
    program = lowered(build_schedule("helix", ranks=3, layers=4, microbatches=6))
    tried = 0
    for rank, instructions in enumerate(program.ranks):
        for i, (a, b) in enumerate(pairwise(instructions)):
            if not (isinstance(a, Send | Receive) and isinstance(b, Send | Receive)):
                continue
            if {a.message.src, a.message.dst} == {b.message.src, b.message.dst}:
                swapped = [*instructions[:i], b, a, *instructions[i + 2 :]]
                with pytest.raises((Mismatch, Deadlock)):
                    run_like_nccl(_with_rank(program, rank, swapped))
                tried += 1
    assert tried > 20


def test_a_receive_posted_after_the_action_that_waits_for_it_does_not_pass() -> None:
    program = lowered(build_schedule("1f1b", ranks=2, layers=2, microbatches=1))
    instructions = list(program.ranks[1])
    receive = next(i for i in instructions if isinstance(i, Receive))
    instructions.remove(receive)
    with pytest.raises(Deadlock):
        run_like_nccl(_with_rank(program, 1, [*instructions, receive]))


def test_a_receive_posted_out_of_its_turn_does_not_pass_where_posts_block() -> None:
    """Guards against an order kept between the two of each pair alone: three pairs can wait in a circle."""
    program = lowered(build_schedule("interleaved", ranks=3, layers=6, microbatches=1, stages_per_rank=2))
    instructions = list(program.ranks[0])
    receive = next(i for i in instructions if isinstance(i, Receive) and i.message.src == 2)
    instructions.remove(receive)
    eager = _with_rank(program, 0, [receive, *instructions])
    run_like_nccl(program, blocking=True)
    run_like_nccl(eager)
    with pytest.raises(Deadlock):
        run_like_nccl(eager, blocking=True)


def test_a_send_that_nobody_receives_does_not_pass() -> None:
    program = lowered(build_schedule("1f1b", ranks=2, layers=2, microbatches=1))
    with pytest.raises((Deadlock, Mismatch)):
        run_like_nccl(_with_rank(program, 1, [i for i in program.ranks[1] if not isinstance(i, Receive)]))


def test_sizes_that_do_not_fit_the_model_are_refused() -> None:
    schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=1)
    with pytest.raises(ConfigError, match=r"^schedule.layers: the schedule has 2 layers and the model 3; "):
        lower(schedule, shape_of(3), Batch(1, (4,)))
    with pytest.raises(ConfigError, match=r"^schedule.segments: the schedule has 1 segments and the batch 2"):
        lower(schedule, shape_of(2), Batch(1, (4, 4)))


def test_an_action_and_its_halves_take_their_flops() -> None:
    schedule = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)
    shape, batch = shape_of(1, causal=False), Batch(1, (4,))
    duration = flops(schedule, shape, batch)
    forward = 2 * 4 * (4 * 8 * 8 + 3 * 8 * 16 + 11 * 8) + 4 * 8 * 16
    attention = 4 * 8 * 16
    backward = 2 * forward + 0.5 * attention
    weights = forward - attention
    taken = [duration(Action(0, kind, 0)) - 1 for kind in (Pass.F, Pass.R, Pass.B, Pass.I, Pass.W)]
    assert taken == [forward, forward, backward, backward - weights, weights]


def test_travelling_weights_come_shortly_before_their_first_use() -> None:
    """A visiting stage's weights are no load on the step's start, nor held for longer than needed."""
    program = lowered(build_schedule("helix", ranks=4, layers=16, microbatches=8, travel="qkv"))
    for instructions in program.ranks:
        runs = [i.action for i in instructions if isinstance(i, Run)]
        seen = 0
        for instruction in instructions:
            seen += isinstance(instruction, Run)
            if isinstance(instruction, Receive) and instruction.message.kind is Kind.WEIGHTS:
                assert runs.index(instruction.message.consumer) - seen <= 4
