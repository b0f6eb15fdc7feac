"""Recorder: the measured Timeline of one rank's step, and of all ranks together.

    asks    takes   takes      ends          a moment each, on CUDA an event that the device comes to later: the last one
      | message | message | action |         that it has come to says what a rank is doing

Ranks have clocks of their own, and share a moment: when the exchange that ended the step before was over. A step begins where
its first rank begins.

    rank 0   | shared   [ 0F0 ][ ...            spans count from a rank's own start; `begun_s` is from the shared moment to there
    rank 1   | shared        [ 1F0 ][ ...
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from helixpipe.errors import RankError
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.runtime.ledger import Held
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.action import Action
from helixpipe.schedule.program import Message

# a message that takes longer than this to be had was waited for
LATE_S = 1e-3
# between looks at a device that is waited for
LOOK_S = 1e-4
Clock = Any
"""Seconds, or an event of a device: `query`, `elapsed_time`, `synchronize`."""


class Summary(NamedTuple):
    """A rank's step in four numbers: from the shared moment to its start and to the end of its last action, and in actions."""

    begun_s: float = 0.0
    ended_s: float = 0.0
    busy_s: float = 0.0
    peak_bytes: float = 0.0
    """The most bytes of activations at one time."""


@dataclass(slots=True)
class _Ran:
    """An action's moments."""

    action: Action
    asked: Clock
    taken: list[tuple[Message, Clock]]
    ended: Clock = None

    @property
    def begun(self) -> Clock:
        return self.taken[-1][1] if self.taken else self.asked


@dataclass
class _Step:
    """What was recorded of a step. Another thread may look at it."""

    ran: list[_Ran] = field(default_factory=list)
    memory: list[tuple[Clock, Held]] = field(default_factory=list)
    peak_bytes: int = 0
    done: int = 0
    """Actions that the device has ended, as far as it was looked at."""


class Recorder:
    """Seconds from `start`; on CUDA through events, so that recording never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._event: Callable[[], Clock] | None = _recorded if device.type == "cuda" else None
        self._start: Clock = 0.0
        self._shared: Clock = None  # the last moment that all ranks shared
        self._before: Clock = None  # that before `start`
        self._step = _Step()

    def meet(self) -> None:
        """All ranks are here: an exchange between them is over."""
        self._shared = self.now()

    def start(self) -> None:
        self._step = _Step()
        self._start = self.now()
        self._before = self._start if self._shared is None else self._shared

    def now(self) -> Clock:
        return time.perf_counter() if self._event is None else self._event()

    def asks(self, action: Action) -> None:
        """The rank comes to an action."""
        self._step.ran.append(_Ran(action, self.now(), []))

    def takes(self, message: Message) -> None:
        """A message that it waits for is here. The action begins with the last."""
        self._step.ran[-1].taken.append((message, self.now()))

    def ends(self, high: Held, held: Held) -> None:
        """`high`: the most bytes since it began; `held`: those now."""
        step, ended = self._step, self.now()
        ran = step.ran[-1]
        ran.ended = ended
        step.memory += [(ran.begun, high), (ended, held)]
        step.peak_bytes = max(step.peak_bytes, sum(high), sum(held))

    def reached(self) -> tuple[str, Message | None]:
        """What the device is at, and the message that it waits for; "" where it is no later than the CPU. Any thread may ask."""
        step = self._step
        if self._event is None:
            return "", None
        while step.done < len(step.ran):
            ran = step.ran[step.done]
            for message, moment in ran.taken:
                if not moment.query():
                    return f"action {ran.action}", message
            if ran.ended is None or not ran.ended.query():
                return f"action {ran.action}", None
            step.done += 1
        return "", None

    def at(self) -> str:
        """What the device is at; "" where it is no later than the CPU."""
        return self.reached()[0]

    def settle(self, timeout_s: float, watch: Watch) -> None:
        """Wait until the device has done all that was recorded. RankError where it comes no further in that time: what for."""
        if self._event is None:
            return
        last, since, done = self.now(), time.monotonic(), -1
        while not last.query():
            at, awaited = self.reached()
            if self._step.done != done:
                since, done = time.monotonic(), self._step.done
            elif time.monotonic() - since > timeout_s:
                what, told = "its device", watch.others()
                if awaited is not None:
                    what, told = str(awaited), watch.told(watch.line[awaited.src])
                raise RankError(f"{watch.me}, at {at or watch.doing}, waited {timeout_s:.0f} s for {what}; {told}")
            time.sleep(LOOK_S)

    def summary(self) -> Summary:
        ran, begun_s = self._step.ran, self._seconds(self._start, self._before)
        ended_s = begun_s + (self._seconds(ran[-1].ended) if ran else 0.0)
        busy_s = sum(self._seconds(each.ended, each.begun) for each in ran)
        return Summary(begun_s, ended_s, busy_s, float(self._step.peak_bytes))

    def spans(self) -> tuple[Span, ...]:
        return tuple(
            Span(each.action, self._seconds(each.begun), self._seconds(each.ended), self._awaited(each))
            for each in self._step.ran
        )

    def memory(self) -> tuple[MemoryPoint, ...]:
        return tuple(MemoryPoint(self._seconds(at), *held) for at, held in self._step.memory)

    def _awaited(self, ran: _Ran) -> str:
        """The last message that it stood waiting for."""
        late, before = "", ran.asked
        for message, taken in ran.taken:
            late = str(message) if self._seconds(taken, before) > LATE_S else late
            before = taken
        return late

    def _seconds(self, at: Clock, since: Clock = None) -> float:
        since = self._start if since is None else since
        if self._event is None:
            return float(at - since)
        at.synchronize()
        return float(since.elapsed_time(at)) / 1e3


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def of_all(mine: Recorder, group: dist.ProcessGroup | None, everywhere: bool = True) -> Timeline | None:
    """The timeline of all ranks of a group, None is this rank alone. Collective. Not `everywhere`: on its rank 0, None elsewhere."""
    if group is None:
        return Timeline((mine.spans(),), (mine.memory(),))
    told: tuple[float, list[Any], list[Any]] = (
        mine.summary().begun_s,
        [(str(span.action), *span[1:]) for span in mine.spans()],
        [tuple(point) for point in mine.memory()],
    )
    everyone = [told] * dist.get_world_size(group)
    if everywhere:
        dist.all_gather_object(everyone, told, group)
    elif dist.get_rank(group) == 0:
        dist.gather_object(told, everyone, group=group, group_dst=0)
    else:
        dist.gather_object(told, group=group, group_dst=0)
        return None
    first_s = min(begun_s for begun_s, *_ in everyone)
    return Timeline(
        tuple(
            tuple(
                Span(Action.parse(action), start_s + begun_s - first_s, end_s + begun_s - first_s, awaited)
                for action, start_s, end_s, awaited in spans
            )
            for begun_s, spans, _ in everyone
        ),
        tuple(
            tuple(MemoryPoint(time_s + begun_s - first_s, *held) for time_s, *held in points)
            for begun_s, _, points in everyone
        ),
    )
