"""Durations to draw a schedule with when nothing is known of model or machine.

    norm 0   qkv 1   attention 3   proj 0   mlp 2   block 6   embed 0   head 0        backward: twice the forward

Small whole numbers of the right order: a layer's FLOPs are 6 : 4s/h : 18 before, in and after attention,
so attention takes half a layer at s = 6h (12h when causal kernels skip the masked half). No stage takes less
than 1, so that an embedding alone is still seen.
"""

from __future__ import annotations

from collections.abc import Callable

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.schedule import Schedule


def unit_durations(schedule: Schedule) -> Callable[[Action], float]:
    """Action -> its units: F and R as the parts say, B twice that, I and W once each; segments share alike."""
    forward = [max(1, sum(part.about.units for part in stage.parts)) for stage in schedule.stages]

    def duration(action: Action) -> float:
        return forward[action.stage] * (2 if action.kind is Pass.B else 1) / schedule.segments

    return duration
