"""Problem: what an order is to be found for, and the best that is found from some to begin with.

orders of named families ──► as they are, where they fit ──┐
            └──► as preferences ──► list scheduling ───────┼──► the best few ──► improve ──► the best
other preferences ──────────────► list scheduling ─────────┘
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from helixpipe.schedule.action import Action
from helixpipe.schedule.cap import Cap, cap_of
from helixpipe.schedule.construct import Built, list_schedule, schedule_of
from helixpipe.schedule.graph import Graph, graph
from helixpipe.schedule.improve import fits, improve
from helixpipe.schedule.order import Stuck
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.vocabulary import GAIN, MORE, Prices, ahead, with_shards

BEST = 3
"""Orders that are improved."""
ACTIONS_TRIED = 200_000
"""In all tries together, where nobody says how many: a bound that is a count, so that every rank builds the same."""
PATIENCE = (0.0, 0.5)

Orders = Sequence[Sequence[Action]]
Kept = Callable[[Schedule], tuple[Callable[[Action], float], Callable[[Action], float]]]
"""Of a schedule, what each forward keeps until its backward, and what an I leaves of that for its W."""


@dataclass(frozen=True)
class Problem:
    """Actions on ranks, what they take and what may be kept."""

    draft: Schedule
    own: int
    """Stages that are no shards of the vocabulary: those are taken as soon as they can be."""
    known: Graph
    cap: Cap | None = None

    @staticmethod
    def of(orders: Schedule, vocabulary: str, prices: Prices, unit: float = 0.0) -> Problem:
        """Of the actions of a schedule, whatever their order, with shards where the vocabulary is spread."""
        draft, paced = with_shards(orders) if vocabulary == "spread" else (orders, {})
        return Problem(draft, len(orders.stages), graph(draft, prices(draft), after=paced, unit=unit))

    def capped(
        self, limits: Sequence[float], kept: Callable[[Action], float], put_off: Callable[[Action], float]
    ) -> Problem:
        """The same with a cap on every rank."""
        return Problem(self.draft, self.own, self.known, cap_of(self.known, limits, kept, put_off))

    def begun(self, orders: Orders) -> Iterator[Built]:
        """From an order of each rank's own actions: as it is, with more forwards ahead of shards, and as a preference."""
        number, best = self.known.number, None
        for more in MORE if self.own < len(self.draft.stages) else MORE[:1]:
            chains = [[number[action] for action in ahead(order, more)] for order in orders]
            try:
                built = list_schedule(self.known, range(len(self.known.actions)), chains=chains)
            except Stuck:
                break
            if not self.fits(built) or (best is not None and built.makespan > best.makespan * (1 - GAIN)):
                break
            best = built
            yield built
        yield from self.preferred(orders)

    def preferred(self, wishes: Orders) -> Iterator[Built]:
        """By list scheduling, each rank's own actions in the order in which it prefers them, and shards before all."""
        number, rank_of = self.known.number, [-1] * len(self.known.actions)
        for wish in wishes:
            for place, action in enumerate(wish):
                rank_of[number[action]] = place
        for patience in PATIENCE:
            yield list_schedule(self.known, rank_of, self.cap, patience=patience)

    def fits(self, built: Built) -> bool:
        """Whether no rank keeps more than it may."""
        return self.cap is None or all(fits(self.cap, order, rank) for rank, order in enumerate(built.orders))

    def schedule(self, built: Built) -> Schedule:
        return schedule_of(self.draft, self.known, built)


def best(starts: Iterable[tuple[Problem, Built]], tries: int) -> tuple[Problem, Built]:
    """The shortest of some orders and of what improves the best few of them; the first one of equals.

    The problems must measure time in one unit. `tries`: runs against the clock that improve one; 0 chooses.
    """
    ranked = sorted(starts, key=lambda start: start[1].makespan)
    distinct = [
        next(group) for _, group in itertools.groupby(ranked, key=lambda start: (start[1].makespan, id(start[0])))
    ]
    found = []
    for problem, built in distinct[:BEST]:
        found.append((problem, improve(problem.known, built, problem.cap, tries or _tries(problem))))
    return min(found, key=lambda each: each[1].makespan)


def _tries(problem: Problem) -> int:
    return max(16, ACTIONS_TRIED // len(problem.known.actions))
