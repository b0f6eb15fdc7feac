"""Timeline: start and end of everything a rank did, and its live bytes over time.

Predicted (`simulate`) and measured (`runtime.recorder`) timelines are this one type, and `view` draws both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from helixpipe.schedule.action import Action


class Span(NamedTuple):
    """One action on a rank, seconds from the step's start. `awaited` is the message it stood waiting for, if any."""

    action: Action
    start_s: float
    end_s: float
    awaited: str = ""


class MemoryPoint(NamedTuple):
    """From `time_s` on, a rank holds so many bytes of activations: kept, in transit, and workspace of what runs.

    Kept is what forwards leave for their backwards, values and gradients that wait for their reader, and weights that visit
    the rank with their gradients.
    """

    time_s: float
    kept_bytes: int
    transit_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def activation_bytes(self) -> int:
        """All three: what the allocator holds of the step."""
        return self.kept_bytes + self.transit_bytes + self.workspace_bytes


class Standing(NamedTuple):
    """Bytes that a rank holds all step long."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Totals:
    """What a timeline comes to: its makespan, and of each rank the seconds in actions and the most bytes of activations."""

    makespan_s: float
    busy_s: tuple[float, ...]
    peak_activation_bytes: tuple[int, ...]

    @property
    def bubble_ratio(self) -> float:
        """The idle share of all ranks' time: 0 when every rank always works."""
        whole = self.makespan_s * len(self.busy_s)
        return 1 - sum(self.busy_s) / whole if whole else 0.0


@dataclass(frozen=True)
class Timeline:
    """`spans[r]` are rank r's actions in the order executed; `memory[r]` its live bytes, by time.

    `standing[r]` are the bytes beside these, where they are known.
    """

    spans: tuple[tuple[Span, ...], ...]
    memory: tuple[tuple[MemoryPoint, ...], ...] = field(default=())
    standing: tuple[Standing, ...] = field(default=())
    settled_s: float = 0.0
    """When the last weight gradients that travel are home, which may be after all actions; 0 where not known."""

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @cached_property
    def makespan_s(self) -> float:
        """From the step's start to the end of the last action."""
        return max((span.end_s for spans in self.spans for span in spans), default=0.0)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Per rank, seconds spent in actions."""
        return tuple(sum(span.end_s - span.start_s for span in spans) for spans in self.spans)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Per rank, seconds of the step spent in none."""
        return tuple(self.makespan_s - busy for busy in self.busy_s)

    @property
    def totals(self) -> Totals:
        return Totals(self.makespan_s, self.busy_s, self.peak_activation_bytes)

    @property
    def bubble_ratio(self) -> float:
        """The idle share of all ranks' time: 0 when every rank always works."""
        return self.totals.bubble_ratio

    @cached_property
    def peak_kept_bytes(self) -> tuple[int, ...]:
        """Per rank, the most bytes that forwards kept at one time."""
        return tuple(max((point.kept_bytes for point in points), default=0) for points in self.memory)

    @cached_property
    def peak_transit_bytes(self) -> tuple[int, ...]:
        """Per rank, the most bytes of messages under way at one time."""
        return tuple(max((point.transit_bytes for point in points), default=0) for points in self.memory)

    @cached_property
    def peak_activation_bytes(self) -> tuple[int, ...]:
        """Per rank, the most bytes of activations at one time: kept, in transit and workspace together."""
        return tuple(max((point.activation_bytes for point in points), default=0) for points in self.memory)

    @cached_property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per rank, the most bytes held at one time: what stands, and activations."""
        return tuple(sum(stands) + most for stands, most in zip(self.standing, self.peak_activation_bytes, strict=True))

    @property
    def order(self) -> tuple[tuple[Action, ...], ...]:
        """Per rank, the actions in the order executed."""
        return tuple(tuple(span.action for span in spans) for spans in self.spans)
