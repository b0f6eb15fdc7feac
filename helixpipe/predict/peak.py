"""How much of its forwards a rank keeps for their backwards, at most: the memory side of a schedule, without a clock."""

from __future__ import annotations

from collections.abc import Callable

from helixpipe.schedule.action import Pass
from helixpipe.schedule.schedule import Schedule


def peak_kept(schedule: Schedule, kept: Callable[[int], float] = lambda stage: 1) -> tuple[float, ...]:
    """Per rank, the most that is kept at one time; `kept` says how much one forward of a stage keeps.

    It is kept from the forward's start to the end of its B, or of its W: an I alone frees nothing.
    """
    peaks = []
    for order in schedule.ranks:
        live = peak = 0.0
        for action in order:
            if action.kind is Pass.F:
                live += kept(action.stage)
                peak = max(peak, live)
            elif action.kind in (Pass.B, Pass.W):
                live -= kept(action.stage)
        peaks.append(peak)
    return tuple(peaks)
