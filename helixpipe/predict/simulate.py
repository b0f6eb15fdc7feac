"""Simulate: Program + costs -> Timeline. The same program that the executor runs, against a clock of our own."""

from __future__ import annotations

from collections.abc import Callable

from helixpipe.predict.timeline import Span, Timeline
from helixpipe.schedule.action import Action
from helixpipe.schedule.order import times
from helixpipe.schedule.program import Accumulate, Message, Program, Receive, Run, Send
from helixpipe.schedule.schedule import Schedule


def simulate_schedule(schedule: Schedule, seconds: Callable[[Action], float]) -> Timeline:
    """A schedule with messages that take no time: what its formulas speak of. No model shape needed."""
    clock = times(schedule, seconds)
    return Timeline(tuple(tuple(Span(a, clock.start[a], clock.end[a]) for a in order) for order in schedule.ranks))


def simulate_program(
    program: Program,
    seconds: Callable[[Action], float],
    message_seconds: Callable[[Message], float] = lambda message: 0.0,
) -> Timeline:
    """A program, messages and all.

    A message travels once both ranks have posted it, and takes `message_seconds`; posting costs nothing.
    An action starts when its rank has come to it and the messages it waits for are here.
    """
    clock = [0.0] * len(program.ranks)
    positions = [0] * len(program.ranks)
    posted: dict[int, float] = {}  # number of a message that one side has posted -> when
    arrived: dict[int, float] = {}
    waiting: dict[int, int] = {}  # number of a message -> the rank that waits for it
    spans: list[list[Span]] = [[] for _ in program.ranks]
    ready = list(range(len(program.ranks)))

    def post(message: Message, now: float) -> None:
        other = posted.pop(message.number, None)
        if other is None:
            posted[message.number] = now
            return
        arrived[message.number] = max(now, other) + message_seconds(message)
        if message.number in waiting:
            ready.append(waiting.pop(message.number))

    while ready:
        rank = ready.pop()
        instructions = program.ranks[rank]
        while positions[rank] < len(instructions):
            instruction = instructions[positions[rank]]
            match instruction:
                case Send(message) | Receive(message):
                    post(message, clock[rank])
                    waits: tuple[Message, ...] = ()
                case Accumulate(message):
                    waits = (message,)
                case Run(_, waits):
                    pass
            missing = next((m for m in waits if m.number not in arrived), None)
            if missing is not None:
                waiting[missing.number] = rank
                break
            last = max(waits, key=lambda m: arrived[m.number], default=None)
            late = last is not None and arrived[last.number] > clock[rank]
            if last is not None and late:
                clock[rank] = arrived[last.number]
            if isinstance(instruction, Run):
                start = clock[rank]
                clock[rank] += seconds(instruction.action)
                spans[rank].append(Span(instruction.action, start, clock[rank], str(last) if late else ""))
            positions[rank] += 1
    for rank, instructions in enumerate(program.ranks):
        if positions[rank] < len(instructions):
            raise RuntimeError(f"rank {rank} never gets past {instructions[positions[rank]]}: lowering is wrong")
    return Timeline(tuple(map(tuple, spans)))
