"""Explain a timeline: why each rank stood idle, and which chain of actions decided the step's length.

    rank 0  |....|F0|F1|..........|B0|..|B1|......|
             warm  1       2    3         drain           warm-up: before a rank's first layer; drain: after its last one

    between: 1 waits for another rank to make what it needs (imbalance; shards, where that is of a spread vocabulary), then
             2 for the message that brings it; 3 what the runtime itself takes (measured timelines only)

Works on predicted and on measured timelines alike: the program says who waits for what.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from helixpipe.predict.timeline import Span, Timeline
from helixpipe.schedule.action import Action
from helixpipe.schedule.program import Accumulate, Message, Program, Run
from helixpipe.schedule.stage import Stage


class Reason(StrEnum):
    """Why a rank stood idle."""

    WARM_UP = "warm_up"
    DRAIN = "drain"
    IMBALANCE = "imbalance"  # another rank was still at what this one needs
    SHARDS = "shards"  # the same, of a shard of the vocabulary, or of the loss that joins them
    MESSAGE = "message"  # it was made, and on its way
    RUNTIME = "runtime"  # neither: the time between two actions


class Idle(NamedTuple):
    """A while in which a rank ran nothing. `source` is the rank it waited for, -1 for none."""

    rank: int
    start_s: float
    end_s: float
    reason: Reason
    source: int = -1
    awaited: str = ""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Step(NamedTuple):
    """An action on the critical path; `waited_s` is how long its rank had stood idle for it."""

    rank: int
    span: Span
    waited_s: float


def idle(program: Program, timeline: Timeline) -> tuple[tuple[Idle, ...], ...]:
    """Per rank, every idle while, in order. Their sum is the rank's `idle_s`."""
    ends, waits = _ends(timeline), _Waits(program)
    shards = frozenset(s for s, stage in enumerate(program.schedule.stages) if _is_shard(stage))
    return tuple(tuple(_of_rank(rank, timeline, ends, waits, shards)) for rank in range(timeline.ranks))


def idle_by_reason(program: Program, timeline: Timeline) -> tuple[dict[str, float], ...]:
    """Per rank, seconds of idle time by reason; every reason is there."""
    found = tuple({str(reason): 0.0 for reason in Reason} for _ in timeline.spans)
    for sums, whiles in zip(found, idle(program, timeline), strict=True):
        for each in whiles:
            sums[each.reason] += each.seconds
    return found


def critical_path(program: Program, timeline: Timeline) -> tuple[Step, ...]:
    """From the step's first moment to its last: each action started as soon as the one before it let it."""
    ends, waits = _ends(timeline), _Waits(program)
    place = {span.action: (rank, i) for rank, spans in enumerate(timeline.spans) for i, span in enumerate(spans)}
    last = max((span for spans in timeline.spans for span in spans), key=lambda span: span.end_s, default=None)
    path: list[Step] = []
    action = None if last is None else last.action
    while action is not None:
        rank, i = place[action]
        span = timeline.spans[rank][i]
        before = timeline.spans[rank][i - 1] if i else None
        path.append(Step(rank, span, span.start_s - (before.end_s if before else 0.0)))
        binding = waits.binding(span, ends)
        action = binding.producer if binding is not None else before and before.action
    return tuple(reversed(path))


class _Waits:
    """The messages that each action waits for, and the gradients that come home since the action before it."""

    def __init__(self, program: Program) -> None:
        self.read: dict[Action, tuple[Message, ...]] = {}
        self.home: dict[Action, tuple[Message, ...]] = {}
        for instructions in program.ranks:
            home: tuple[Message, ...] = ()
            for each in instructions:
                if isinstance(each, Accumulate):
                    home += (each.message,)
                elif isinstance(each, Run):
                    self.read[each.action], self.home[each.action], home = each.waits, home, ()

    def binding(self, span: Span, ends: dict[Action, float]) -> Message | None:
        """What an action stood waiting for, if for anything: of what it reads, the message whose producer ended last.

        Weights, which nothing on the path makes, only when there is no other.
        """
        if not span.awaited:
            return None
        home = next((m for m in self.home.get(span.action, ()) if str(m) == span.awaited), None)
        if home is not None:
            return home
        read = self.read.get(span.action, ())
        made = [m for m in read if m.producer is not None]
        return max(made, key=lambda m: ends[m.producer], default=next(iter(read), None))


def _is_shard(stage: Stage) -> bool:
    """Whether it is of a spread vocabulary, and has nothing of a layer."""
    return all(part.about.sharded or part.about.joins for part in stage.parts)


def _of_rank(
    rank: int, timeline: Timeline, ends: dict[Action, float], waits: _Waits, shards: frozenset[int]
) -> Iterator[Idle]:
    """Rows are looked up long before layers run, and their gradients come long after: neither warms up or drains a rank."""
    spans, at = timeline.spans[rank], 0.0
    layers = [i for i, span in enumerate(spans) if span.action.stage not in shards]
    first, last = (layers[0], layers[-1]) if layers else (0, len(spans))
    for i, span in enumerate(spans):
        if span.start_s > at:
            if i <= first:
                yield Idle(rank, at, span.start_s, Reason.WARM_UP)
            elif i > last:
                yield Idle(rank, at, span.start_s, Reason.DRAIN)
            else:
                yield from _gap(rank, at, span, waits.binding(span, ends), ends, shards)
        at = max(at, span.end_s)
    if timeline.makespan_s > at:
        yield Idle(rank, at, timeline.makespan_s, Reason.DRAIN)


def _gap(
    rank: int, at: float, span: Span, binding: Message | None, ends: dict[Action, float], shards: frozenset[int]
) -> Iterator[Idle]:
    if binding is None:
        yield Idle(rank, at, span.start_s, Reason.RUNTIME)
        return
    made, source = at, Reason.IMBALANCE
    if binding.producer is not None:
        made = min(max(at, ends[binding.producer]), span.start_s)
        source = Reason.SHARDS if binding.producer.stage in shards else Reason.IMBALANCE
    if made > at:
        yield Idle(rank, at, made, source, binding.src, str(binding))
    if span.start_s > made:
        yield Idle(rank, made, span.start_s, Reason.MESSAGE, binding.src, str(binding))


def _ends(timeline: Timeline) -> dict[Action, float]:
    return {span.action: span.end_s for spans in timeline.spans for span in spans}
