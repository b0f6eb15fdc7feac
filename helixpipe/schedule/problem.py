"""Problem: what an order is to be found for, and the best that is found from some to begin with.

orders of named families ──► as they are, where they fit ──┐
            └──► as preferences ──► list scheduling ───────┼──► the best of each ──► improve ──► the best
other preferences ──────────────► list scheduling ─────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from helixpipe.schedule.action import Action
from helixpipe.schedule.cap import Cap, cap_of
from helixpipe.schedule.construct import Built, list_schedule, schedule_of
from helixpipe.schedule.graph import Graph, graph, rounded
from helixpipe.schedule.improve import fits, improve
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.vocabulary import Prices, deeper, delay, with_shards

ACTIONS_TRIED, MOST_TRIES = 400_000, 3000
"""In all tries together, and tries, where nobody says how many: bounds that are counts, so that every rank builds the same."""
PATIENCE = (0.0, 0.5)

Orders = Sequence[Sequence[Action]]


class Keeps(NamedTuple):
    """What forwards keep, each asked by its forward, in one unit."""

    until_backward: Callable[[Action], float]
    put_off: Callable[[Action], float]
    """What an I leaves of that for its W."""
    usual: Callable[[Action], float]
    """`until_backward` where every micro-batch is like the others: by it micro-batches of memory are counted."""


Kept = Callable[[Schedule], Keeps]
"""What the forwards of a schedule keep."""


@dataclass(frozen=True)
class Problem:
    """Actions on ranks, what they take and what may be kept."""

    draft: Schedule
    own: int
    """Stages that are no shards of the vocabulary: those are taken as soon as they can be."""
    known: Graph
    costs: Callable[[Action], float]
    numbers: tuple[int, ...]
    """By the place at which it is finished, the number of each micro-batch."""
    cap: Cap | None = None

    @staticmethod
    def of(orders: Schedule, vocabulary: str, prices: Prices, share: float, unit: float = 0.0) -> Problem:
        """Of the actions of a schedule, whatever their order, with shards where the vocabulary is spread; `share`: see `delay`.

        `unit`: of time; chosen when 0.
        """
        draft, paced = with_shards(orders) if vocabulary == "spread" else (orders, {})
        costs, own = prices(draft), len(orders.stages)
        known = graph(draft, costs, delay(draft, costs, own, share), paced, unit)
        return Problem(draft, own, known, costs, tuple(range(draft.microbatches)))

    def taken_as(self, numbers: Sequence[int]) -> Problem:
        """The same with micro-batches finished in another order."""
        found = replace(self, numbers=tuple(numbers))
        takes = rounded(map(self.costs, map(found.numbered, self.known.actions)), self.known.unit)
        return replace(found, known=self.known.taking(takes))

    def capped(self, limits: Sequence[float], keeps: Keeps) -> Problem:
        """The same with a cap on every rank. What shards keep is not counted: it is gone again when the unit's loss is known."""

        def of_own(keeps: Callable[[Action], float]) -> Callable[[Action], float]:
            return lambda forward: keeps(self.numbered(forward)) if forward.stage < self.own else 0.0

        return replace(self, cap=cap_of(self.known, limits, of_own(keeps.until_backward), of_own(keeps.put_off)))

    def numbered(self, action: Action) -> Action:
        """An action of the micro-batch that is finished at a place."""
        return action._replace(microbatch=self.numbers[action.microbatch])

    def begun(self, orders: Orders) -> Iterator[Built]:
        """From an order of each rank's own actions: as it is, with more forwards ahead of shards, and as a preference."""
        if self.own < len(self.draft.stages):
            yield from deeper(self.known, orders, self.fits)
        else:
            chains = [[self.known.number[action] for action in order] for order in orders]
            built = list_schedule(self.known, range(len(self.known.actions)), chains=chains)
            if self.fits(built):
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
        """What was built, micro-batches by their numbers."""
        found = schedule_of(self.draft, self.known, built)
        return Schedule(found.stages, tuple(tuple(map(self.numbered, order)) for order in found.ranks))


def shortest(
    starts: Iterable[tuple[Problem, Built]], best: tuple[Problem, Built] | None = None
) -> tuple[Problem, Built]:
    """The first of the shortest of some orders. Problems must measure time in one unit."""
    for problem, built in starts:
        if best is None or built.makespan < best[1].makespan:
            best = problem, built
    if best is None:
        raise ValueError("no orders to begin with")
    return best


def improved(problem: Problem, built: Built, tries: int) -> tuple[Problem, Built]:
    """What so many runs against the clock make of it; 0 chooses how many."""
    return problem, improve(problem.known, built, problem.cap, tries or _tries(problem))


def _tries(problem: Problem) -> int:
    return max(4, min(MOST_TRIES, ACTIONS_TRIED // len(problem.known.actions)))
