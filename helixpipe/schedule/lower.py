"""Lowering: Schedule + ModelShape -> Program.

What to send is derived. A value whose producer and consumer run on different ranks becomes a message, and
its gradient the message back. A parameter used on a rank that does not own it travels there once a step,
and its gradient home: this is how a visiting stage gets its weights, and a tied head its table. Of a frozen
parameter nothing comes home.

How messages are ordered, and why that cannot deadlock:

    time  ------------------------------------------>       every message has one time: when it can leave,
    src   [ producer ]S [        ]                          in a run of the schedule against a clock of our own.
    dst   R [        ] [      ] [ consumer ]                Its receive is posted before the action that runs at
                                                            that time (and one action earlier, against jitter).
    Every rank posts all its messages in the order of these times, whoever they go to or come from. So whatever
    waits, waits for something earlier in one common order: also where a pair's messages match by order alone, where
    one queue takes them all, and where a post waits for its other end (NCCL).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part
from helixpipe.parts.work import Batch, first_alike
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.order import Times, times
from helixpipe.schedule.program import (
    Accumulate,
    Instruction,
    Kind,
    Message,
    Program,
    Receive,
    Run,
    Send,
    visits,
)
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from helixpipe.parts.kind import Shapes
    from helixpipe.parts.shape import ModelShape

# a message is received so many actions before it can leave: buffers against jitter
LOOKAHEAD = 1


class _Draft(NamedTuple):
    """A message before it has a number. `time` and `place` order it."""

    time: float
    place: int
    kind: Kind
    src: int
    dst: int
    producer: Action | None
    consumer: Action | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def lower(
    schedule: Schedule,
    shape: ModelShape,
    batches: Batch | Sequence[Batch],
    duration: Callable[[Action], float] | None = None,
) -> Program:
    """The program of a checked schedule. `batches`: one for all micro-batches, or of each its own. `duration` (any unit)
    orders messages; FLOPs when not given. Raises ConfigError for batches that are not the schedule's.
    """
    if schedule.layers != shape.layers:
        raise ConfigError(
            f"schedule.layers: the schedule has {schedule.layers} layers and the model {shape.layers}; build it for the model"
        )
    each = of_each(schedule, batches)
    clock = times(schedule, duration or flops(schedule, shape, each))
    drafts = [*_values(schedule, shape, each, clock), *_parameters(schedule, shape, clock)]
    drafts.sort(key=lambda draft: draft[:2])
    messages = tuple(Message(number, *draft[2:]) for number, draft in enumerate(drafts))
    when = [draft[:2] for draft in drafts]
    posted: list[list[Message]] = [[] for _ in schedule.ranks]
    for message in messages:
        posted[message.src].append(message)
        posted[message.dst].append(message)
    ranks = tuple(_place(rank, schedule, clock, mine, when) for rank, mine in enumerate(posted))
    return Program(schedule, shape, each, messages, ranks)


def of_each(schedule: Schedule, batches: Batch | Sequence[Batch]) -> tuple[Batch, ...]:
    """A batch for each micro-batch of a schedule. Raises ConfigError where they do not suit it, or one another."""
    each = (batches,) * schedule.microbatches if isinstance(batches, Batch) else tuple(batches)
    if len(each) != schedule.microbatches:
        raise ConfigError(
            f"batches: {len(each)}, and the schedule has {schedule.microbatches} micro-batches; give one for all, or of each its own"
        )
    for batch in each:
        if schedule.segments != len(batch.segment_lengths):
            raise ConfigError(
                f"schedule.segments: the schedule has {schedule.segments} segments and the batch {len(batch.segment_lengths)}"
            )
    sizes = dict.fromkeys((batch.microbatch_size, batch.sequence_length) for batch in each)
    if len(sizes) > 1:
        told = ", ".join(f"{size} of {length} tokens" for size, length in sizes)
        raise ConfigError(f"batches: micro-batches of different sequences, {told}; give all as many of one length")
    return each


def flops(schedule: Schedule, shape: ModelShape, batches: Batch | Sequence[Batch]) -> Callable[[Action], float]:
    """FLOPs of each action, as a duration: enough to order messages by."""
    each = of_each(schedule, batches)
    alike, segments = first_alike(each), range(schedule.segments)
    one = {shape.alike(part): part for stage in schedule.stages for part in stage.parts}
    stages = [[shape.alike(part) for part in stage.parts] for stage in schedule.stages]

    def total(of: Callable[[Part, Batch, int], float]) -> dict[int, list[list[float]]]:
        """By batch, stage and segment; of parts that are alike, one is priced, and of batches that are."""
        found = {}
        for number in dict.fromkeys(alike):
            prices = {like: [of(part, each[number], s) for s in segments] for like, part in one.items()}
            found[number] = [[sum(prices[like][s] for like in stage) for s in segments] for stage in stages]
        return found

    forward, backward, weight = total(shape.forward_flops), total(shape.backward_flops), total(shape.weight_flops)

    def duration(action: Action) -> float:
        stage, kind, mb, segment = action
        like = alike[mb]
        if kind in (Pass.F, Pass.R):
            return 1.0 + forward[like][stage][segment]
        if kind is Pass.W:
            return 1.0 + weight[like][stage][segment]
        late = weight[like][stage][segment] if kind is Pass.I else 0.0
        return 1.0 + backward[like][stage][segment] - late

    return duration


def _values(schedule: Schedule, shape: ModelShape, batches: tuple[Batch, ...], clock: Times) -> list[_Draft]:
    """Every edge between two ranks, forward and back."""
    drafts = []
    named = [(edge, tuple(map(str, edge.values))) for edge in schedule.edges]
    alike = first_alike(batches)
    shapes = {
        number: [
            [tuple(shape.value_shape(v, batches[number], seg) for v in edge.values) for seg in range(schedule.segments)]
            for edge in schedule.edges
        ]
        for number in dict.fromkeys(alike)
    }
    for e, (edge, names) in enumerate(named):
        for mb in range(schedule.microbatches):
            sizes = shapes[alike[mb]][e]
            src, dst = schedule.placement[edge.producer, mb], schedule.placement[edge.consumer, mb]
            if src == dst:
                continue
            for seg in range(schedule.segments):
                made, read = Action(edge.producer, Pass.F, mb, seg), Action(edge.consumer, Pass.F, mb, seg)
                drafts.append(
                    _Draft(clock.end[made], clock.place[made], Kind.VALUES, src, dst, made, read, names, sizes[seg])
                )
                if (edge.consumer, mb, seg) not in schedule.input_gradient:
                    continue  # forward only
                made = schedule.backward_of(edge.consumer, mb, seg)
                read = schedule.backward_of(edge.producer, mb, seg)
                drafts.append(
                    _Draft(clock.end[made], clock.place[made], Kind.GRADIENTS, dst, src, made, read, names, sizes[seg])
                )
    return drafts


def _parameters(schedule: Schedule, shape: ModelShape, clock: Times) -> list[_Draft]:
    """Weights to each rank that uses but does not own them, before their first use; gradients home after the last."""
    drafts = []
    for stage, rank, owner, parameters in visits(schedule, shape):
        uses = [a for a in schedule.ranks[rank] if a.stage == stage]
        first, last = uses[0], uses[-1]
        time, place = _early(schedule.ranks[rank], clock, first)
        drafts.append(_Draft(time, place, Kind.WEIGHTS, owner, rank, None, first, *_payload(parameters)))
        trained = {name: size for name, size in parameters.items() if shape.trains(name)}
        if trained and (last.kind in BACKWARD or last.kind is Pass.W):
            time, place = clock.end[last], clock.place[last]
            drafts.append(_Draft(time, place, Kind.WEIGHT_GRADIENTS, rank, owner, last, None, *_payload(trained)))
    return drafts


def _payload(parameters: Shapes) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    return tuple(parameters), tuple(parameters.values())


def _early(order: tuple[Action, ...], clock: Times, first: Action) -> tuple[float, int]:
    """A moment shortly before `first`: weights can leave at any time, so they need not crowd the step's start."""
    at = bisect.bisect_left(order, clock.start[first], key=clock.start.__getitem__)
    before = order[max(0, at - 1 - LOOKAHEAD)]
    return clock.start[before], -1


def _place(
    rank: int, schedule: Schedule, clock: Times, messages: list[Message], when: list[tuple[float, int]]
) -> tuple[Instruction, ...]:
    """One rank's instructions: its actions, and between them the messages it posts, `messages`, in the order of their numbers."""
    order = schedule.ranks[rank]
    # place settles equal times: an action that takes no time must not seem to end before what it waits for
    ends = [(clock.end[action], clock.place[action]) for action in order]
    index = {action: i for i, action in enumerate(order)}
    slots: list[list[Instruction]] = [[] for _ in range(len(order) + 1)]  # slot i is before action i
    adds: list[list[Instruction]] = [[] for _ in range(len(order) + 1)]
    waits: dict[Action, list[Message]] = {}
    floor = 0  # the slot of the last message
    posts: list[tuple[int, Message]] = []
    for message in messages:
        running = bisect.bisect_right(ends, when[message.number])  # the first action that ends later
        if message.src == rank and message.producer is not None:
            slot = index[message.producer] + 1
        else:
            slot = running - LOOKAHEAD
        floor = max(slot, floor)
        posts.append((floor, message))
        if message.dst == rank and message.consumer is not None:
            waits.setdefault(message.consumer, []).append(message)
        if message.dst == rank and message.consumer is None:
            adds[min(max(running + 1, floor), len(order))].append(Accumulate(message))
    for slot, message in posts:
        slots[slot].append(Send(message) if message.src == rank else Receive(message))
    program: list[Instruction] = []
    for i in range(len(order) + 1):
        program += slots[i] + adds[i]
        if i < len(order):
            program.append(Run(order[i], tuple(waits.get(order[i], ()))))
    return tuple(program)
