"""Recorder: the measured Timeline of one rank's step."""

from __future__ import annotations

import time

import torch

from helixpipe.predict.timeline import MemoryPoint, Span
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
