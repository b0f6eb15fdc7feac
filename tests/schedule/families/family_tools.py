"""What the tests of the families measure by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from helixpipe.predict.simulate import simulate_schedule
from helixpipe.predict.timeline import Timeline
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.schedule import Schedule


def drawn(family: object) -> str:
    """The staircase in the docstring of a family's file, a line a rank, without indentation."""
    doc = sys.modules[family.__module__].__doc__
    return "\n".join(line.strip() for line in doc.splitlines() if line.strip().startswith("rank "))


def passes(f: float, b: float, w: float = 0.0) -> Callable[[Action], float]:
    """Costs from a table: a forward, a full backward or an I, a W."""
    table = {Pass.F: f, Pass.B: b, Pass.I: b, Pass.W: w}
    return lambda action: table[action.kind]


def makespan(schedule: Schedule, f: float, b: float, w: float = 0.0) -> float:
    return simulate_schedule(schedule, passes(f, b, w)).makespan_s


def longest_span(timeline: Timeline) -> float:
    """From a rank's first action to its last, the most of all ranks: what zero-bubble papers measure.

    A rank that starts late may end late when steps follow each other without a common stop.
    """
    return max(spans[-1].end_s - spans[0].start_s for spans in timeline.spans if spans)


def peak_units(schedule: Schedule, kept: Callable[[Action], float]) -> tuple[float, ...]:
    """Per rank, the most kept at one time, where `kept` says what one forward keeps until its B or W."""
    peaks = []
    for order in schedule.ranks:
        live = peak = 0.0
        for action in order:
            live += {Pass.F: 1, Pass.B: -1, Pass.W: -1}.get(action.kind, 0) * kept(action)
            peak = max(peak, live)
        peaks.append(peak)
    return tuple(peaks)


def warm_up(order: Sequence[Action]) -> int:
    """Forwards before the first backward."""
    return next(i for i, action in enumerate(order) if action.kind in BACKWARD)
