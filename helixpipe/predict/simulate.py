"""Simulate: Program + costs -> Timeline. The same program that the executor runs, against a clock of our own.

    src   [ action ]S--------.                    S, R: a message is posted (costs nothing)
                     '--===>  arrives             ===: it travels, once both ranks have posted it and the sender's
    dst        R[ action ]....[ action ]               way out and the receiver's way in are free; and the pair's one
                                                       communicator, where it has one for both directions

Ranks are taken in the order of their clocks, so whatever shares a link is served in the order of time.

Where a rank's own processor carries its messages, they take that time from its actions: the next one is longer by it. What fell
into a wait is free.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping
from helixpipe.predict.hardware import Communicators
from helixpipe.predict.memory import Held, held_bytes
from helixpipe.predict.readers import one_tensor
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
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
    message_bytes: Callable[[Message], int] = lambda message: 0,
    keeping: Keeping | None = None,
    share: ModelShape | None = None,
    communicators: Communicators = "direction",
    host_seconds: Callable[[Message], float] | None = None,
) -> Timeline:
    """A program, messages and all: linear in its instructions.

    A message takes `message_seconds` of its sender's link out and of its receiver's link in. An action starts when
    its rank has come to it and the messages it waits for are here. With `keeping` the timeline has live bytes:
    activations, and `message_bytes` of what is under way (from a send's posting to its end, from a receive's posting
    until the action that reads it). `share` is what one accelerator of a rank holds of the parameters, see `held_bytes`.
    `communicators`: whether messages of two ranks in both directions travel at once, or take turns. `host_seconds`: what a
    message takes of each end's own processor while it travels; None is nothing.
    """
    run = _Run(program, message_seconds, message_bytes, keeping is not None, communicators == "pair", host_seconds)
    while run.ready:
        clock, rank = heapq.heappop(run.ready)
        run.go_on(rank, clock, seconds)
    for rank, instructions in enumerate(program.ranks):
        if run.positions[rank] < len(instructions):
            raise RuntimeError(f"rank {rank} never gets past {instructions[run.positions[rank]]}: lowering is wrong")
    spans = tuple(map(tuple, run.spans))
    if keeping is None:
        return Timeline(spans, settled_s=run.settled_s)
    run.count_once()
    kept = held_bytes(program, keeping, share)
    memory = tuple(_memory(*each) for each in zip(spans, kept, run.buffers, strict=True))
    return Timeline(spans, memory, settled_s=run.settled_s)


@dataclass
class _Run:
    """A simulation under way."""

    program: Program
    message_seconds: Callable[[Message], float]
    message_bytes: Callable[[Message], int]
    counts: bool
    takes_turns: bool
    host_seconds: Callable[[Message], float] | None
    positions: list[int] = field(init=False)
    spans: list[list[Span]] = field(init=False)
    buffers: list[list[tuple[float, int]]] = field(init=False)
    """Per rank, (when, bytes more)."""
    ready: list[tuple[float, int]] = field(init=False)
    """A heap of (clock, rank): ranks that can go on."""
    settled_s: float = 0.0

    def __post_init__(self) -> None:
        ranks = len(self.program.ranks)
        self.positions = [0] * ranks
        self.spans = [[] for _ in range(ranks)]
        self.buffers = [[] for _ in range(ranks)]
        self.ready = [(0.0, rank) for rank in range(ranks)]
        self._way_out, self._way_in = [0.0] * ranks, [0.0] * ranks  # when each rank's link is free
        self._pair: dict[tuple[int, int], float] = {}  # and each pair's communicator, where messages take turns
        self._free = [0.0] * ranks  # when each rank's last action ended
        self._stalled: list[Message | None] = [None] * ranks  # what an Accumulate waited for since then
        self._posted: set[int] = set()  # numbers of messages that one side has posted
        self._arrived: dict[int, float] = {}
        self._waiting: dict[int, int] = {}  # number of a message -> the rank that waits for it
        self._carries: list[list[tuple[float, float, float]]] = [[] for _ in range(ranks)]  # see `_taken_s`
        self._one_tensor = one_tensor(self.program) if self.counts else {}
        self._carried: dict[int, list[tuple[float, int, int]]] = {}  # of those: when, more or fewer, bytes

    def go_on(self, rank: int, clock: float, seconds: Callable[[Action], float]) -> None:
        """Carry out a rank's instructions up to the end of its next action, or to a message that is not here."""
        instructions = self.program.ranks[rank]
        arrived = self._arrived
        while self.positions[rank] < len(instructions):
            instruction = instructions[self.positions[rank]]
            if isinstance(instruction, (Send, Receive)):
                self._post(instruction.message, rank, clock)
                self.positions[rank] += 1
                continue
            waits = instruction.waits if isinstance(instruction, Run) else (instruction.message,)
            last: Message | None = None
            for message in waits:
                when = arrived.get(message.number)
                if when is None:
                    self._waiting[message.number] = rank
                    return
                if when > self._free[rank] and (last is None or when > arrived[last.number]):
                    last = message
            start = clock if last is None else max(clock, arrived[last.number])
            for message in waits:
                self._holds(rank, start, -1, message)
            self.positions[rank] += 1
            if isinstance(instruction, Accumulate):
                self.settled_s = max(self.settled_s, start)
                self._stalled[rank] = self._later(self._stalled[rank], last)
                if start > clock:  # others may post before it is here
                    heapq.heappush(self.ready, (start, rank))
                    return
                continue
            last, self._stalled[rank] = self._later(last, self._stalled[rank]), None
            end = start + seconds(instruction.action) + self._taken_s(rank, start)
            self._free[rank] = end
            self.spans[rank].append(Span(instruction.action, start, end, "" if last is None else str(last)))
            heapq.heappush(self.ready, (end, rank))
            return

    def _taken_s(self, rank: int, start: float) -> float:
        """What messages took of a rank's processor since its last action began; not in the wait before this one, which is free."""
        carries, free = self._carries[rank], self._free[rank]
        taken_s = 0.0
        for leaves, arrives, host_s in carries:
            waited_s = min(arrives, start) - max(leaves, free)
            taken_s += host_s * (1 - max(0.0, waited_s) / (arrives - leaves))
        carries.clear()
        return taken_s

    def _later(self, first: Message | None, second: Message | None) -> Message | None:
        """Of two messages the one that arrived later, if either is one."""
        if first is None or second is None:
            return first or second
        return max(first, second, key=lambda message: self._arrived[message.number])

    def _post(self, message: Message, rank: int, clock: float) -> None:
        """One side of a message; with the second one it leaves."""
        number, src, dst = message.number, message.src, message.dst
        self._holds(rank, clock, 1, message)
        if number not in self._posted:
            self._posted.add(number)
            return
        self._posted.discard(number)
        leaves = max(clock, self._way_out[src], self._way_in[dst])
        takes = self.message_seconds(message)
        if self.takes_turns:
            pair = (min(src, dst), max(src, dst))
            leaves = max(leaves, self._pair.get(pair, 0.0))
            self._pair[pair] = leaves + takes
        self._arrived[number] = self._way_out[src] = self._way_in[dst] = leaves + takes
        self._holds(src, leaves + takes, -1, message)
        if self.host_seconds is not None and takes:
            for end in (src, dst):
                self._carries[end].append((leaves, leaves + takes, self.host_seconds(message)))
        if number in self._waiting:
            heapq.heappush(self.ready, (leaves + takes, self._waiting.pop(number)))

    def _holds(self, rank: int, when: float, sign: int, message: Message) -> None:
        if not self.counts:
            return
        nbytes = self.message_bytes(message)
        if rank == message.src and (first := self._one_tensor.get(message.number)) is not None:
            self._carried.setdefault(first, []).append((when, -sign, nbytes))
        else:
            self.buffers[rank].append((when, sign * nbytes))

    def count_once(self) -> None:
        """Of messages that carry one tensor: it is there from the first one's posting to the last one's end."""
        for first, events in self._carried.items():
            rank, under_way = self.program.messages[first].src, 0
            for when, fewer, nbytes in sorted(events):  # at one moment those that are posted come first
                if not under_way or under_way == fewer:
                    self.buffers[rank].append((when, -fewer * nbytes))
                under_way -= fewer


def _memory(
    spans: tuple[Span, ...], kept: tuple[Held, ...], buffers: list[tuple[float, int]]
) -> tuple[MemoryPoint, ...]:
    """Live bytes of one rank over time. An action holds its most from its start to its end.

    At one moment: an action ends, messages are posted and taken, the next one starts.
    """
    moments: list[tuple[float, int, tuple[int, int] | None, int]] = [(when, 1, None, size) for when, size in buffers]
    for span, held in zip(spans, kept, strict=True):
        moments += [(span.start_s, 2, held[:2], 0)]
        moments += [(span.end_s, 0 if span.end_s > span.start_s else 2, (held.left_bytes, 0), 0)]
    moments.sort(key=lambda moment: moment[:2])
    points = []
    now, under_way = (0, 0), 0
    for when, _, held_now, size in moments:
        now, under_way = now if held_now is None else held_now, under_way + size
        points.append(MemoryPoint(when, now[0], under_way, now[1]))
    return tuple(points)
