"""Turns: ranks that compute on one core at one time, each at an equal share of its speed, as an operating system gives it.

rank 0   [ 2 s of work            ]          alone for 1 s, half of the core for 2 s: done at 3
rank 2            [ 1 s of work   ]          half of the core from 1 on: done at 3
         0        1        2      3
"""

from __future__ import annotations

from collections.abc import Sequence


class Turns:
    """`cores`: of each rank its core; () where each has its own, and nothing here is asked."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.shared = len(set(cores)) < len(cores)
        self.ends: list[tuple[float, int]] = []
        """(when, rank) of all that computes, soonest first, if nobody else begins or ends."""
        self._cores = cores
        self._left_s: dict[int, float] = {}
        """By rank: what is left of its action, in seconds of a core of its own."""
        self._clock_s = 0.0

    def begin(self, rank: int, now_s: float, work_s: float) -> None:
        """A rank begins what takes `work_s` on a core of its own. Calls come in the order of time."""
        self._go_on(now_s)
        self._left_s[rank] = work_s
        self._foresee()

    def end(self) -> tuple[float, int]:
        """The soonest end: when, and whose."""
        end_s, rank = self.ends[0]
        self._go_on(end_s)
        del self._left_s[rank]
        self._foresee()
        return end_s, rank

    def _go_on(self, now_s: float) -> None:
        passed_s, self._clock_s = now_s - self._clock_s, now_s
        for rank in self._left_s:
            self._left_s[rank] -= passed_s / self._sharing(rank)

    def _foresee(self) -> None:
        ends = ((self._clock_s + max(0.0, left_s) * self._sharing(rank), rank) for rank, left_s in self._left_s.items())
        self.ends = sorted(ends)

    def _sharing(self, rank: int) -> int:
        """How many compute on its core now."""
        return sum(self._cores[other] == self._cores[rank] for other in self._left_s)
