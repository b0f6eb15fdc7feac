"""Straggler: whether a rank's actions take longer than they used to, told by the rank itself in one number a step.

Each kind of action (pass, stage) is held to its own median on its own rank, so ranks with more work, or slower devices from
the start, are no stragglers: one that slows down is (a hot device, a neighbour on the machine, a failing link).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import fmean, median

from helixpipe.predict.timeline import Span
from helixpipe.schedule.action import Pass

# steps over which actions are compared with their medians
WINDOW = 20
# steps of which the medians are: a rank that stays slow is told for half of them
REMEMBERED = 10 * WINDOW
# times its own median, from which on a rank is named
SLOW = 1.5
# first steps, which allocate and load what later ones have
_WARMING = 2


class Straggler:
    """Of one rank."""

    def __init__(self) -> None:
        self._steps = 0
        self._usual: defaultdict[tuple[Pass, int], deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def ratio(self, spans: Sequence[Span]) -> float:
        """How many times their own median this rank's actions took over the last WINDOW steps, of which `spans` are the
        last one's; 1 before there are so many.
        """
        self._steps += 1
        if self._steps <= _WARMING:
            return 1.0
        taken: defaultdict[tuple[Pass, int], list[float]] = defaultdict(list)
        for action, start_s, end_s, _ in spans:
            taken[action.kind, action.stage].append(end_s - start_s)
        usual_s = 0.0
        for kind, seconds in taken.items():
            self._usual[kind].append(fmean(seconds))
            usual_s += len(seconds) * median(self._usual[kind])
        self._window.append((sum(map(sum, taken.values())), usual_s))
        took_s, usual_s = map(sum, zip(*self._window, strict=True))
        return took_s / usual_s if len(self._window) == WINDOW and usual_s else 1.0
