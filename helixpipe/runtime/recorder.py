"""Recorder: the measured Timeline of one rank's step, and of all ranks together."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.runtime.ledger import Held
from helixpipe.schedule.action import Action

Clock = float | torch.cuda.Event


class Recorder:
    """Seconds from `start`; on CUDA through events, so that recording never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start: Clock = 0.0
        self._spans: list[tuple[Action, Clock, Clock, str]] = []
        self._memory: list[tuple[Clock, Held]] = []

    def start(self) -> None:
        self._spans.clear()
        self._memory.clear()
        self._start = self.now()

    def now(self) -> Clock:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ran(self, action: Action, begun: Clock, ended: Clock, awaited: str) -> None:
        self._spans.append((action, begun, ended, awaited))

    def holds(self, at: Clock, held: Held) -> None:
        self._memory.append((at, held))

    def spans(self) -> tuple[Span, ...]:
        return tuple(Span(a, self._seconds(b), self._seconds(e), awaited) for a, b, e, awaited in self._spans)

    def memory(self) -> tuple[MemoryPoint, ...]:
        return tuple(MemoryPoint(self._seconds(at), *held) for at, held in self._memory)

    def _seconds(self, at: Clock) -> float:
        if isinstance(at, torch.cuda.Event) and isinstance(self._start, torch.cuda.Event):
            at.synchronize()
            return float(self._start.elapsed_time(at)) / 1e3
        assert isinstance(at, float)
        assert isinstance(self._start, float)
        return at - self._start


def of_all(mine: Recorder, group: dist.ProcessGroup | None) -> Timeline:
    """The timeline of all ranks of a group, None is this rank alone. Collective."""
    if group is None:
        return Timeline((mine.spans(),), (mine.memory(),))
    told: tuple[list[Any], list[Any]] = (
        [(str(span.action), *span[1:]) for span in mine.spans()],
        [tuple(point) for point in mine.memory()],
    )
    everyone = [told] * dist.get_world_size(group)
    dist.all_gather_object(everyone, told, group)
    return Timeline(
        tuple(tuple(Span(Action.parse(action), *more) for action, *more in spans) for spans, _ in everyone),
        tuple(tuple(MemoryPoint(*point) for point in points) for _, points in everyone),
    )
