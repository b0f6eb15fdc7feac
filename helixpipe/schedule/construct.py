"""Construct: an order for each rank, by list scheduling, from what actions take and what ranks may keep.

Whenever a rank is free it takes, of the actions that have all they wait for and that its cap has room for, the one it
prefers. It does not begin one it likes less where a better one is known to come within `patience` of that one's time.

    p=2, m=3, one column a unit of time, F = B = 1, backwards preferred, then the first micro-batch; caps of 2 forwards and of 1:

    rank 0   F0 F1 .. B0 F2 B1 .. B2
    rank 1   .. F0 B0 F1 B1 F2 B2

    rank 0   F0 .. .. B0 F1 .. .. B1 F2 .. .. B2
    rank 1   .. F0 B0 .. .. F1 B1 .. .. F2 B2

Every run against the clock is linear in the actions but for the heaps of what is ready. Nothing is drawn by lot, times are whole
numbers and equals go by number, so every rank and every machine builds the same. `check` proves the result like any other.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helixpipe.schedule.action import Action
from helixpipe.schedule.cap import Cap, Kept, cap_of
from helixpipe.schedule.graph import Graph, graph
from helixpipe.schedule.order import Stuck
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage


@dataclass(frozen=True)
class Built:
    """When each action of a graph starts, and each rank's actions in order."""

    start: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    makespan: int


def construct(
    stages: Sequence[Stage],
    placement: Sequence[Sequence[Action]],
    costs: Callable[[Action], float],
    cap: Sequence[float] | None = None,
    *,
    kept: Callable[[Action], float] = lambda forward: 1.0,
    put_off: Callable[[Action], float] = lambda forward: 0.0,
    travel: Callable[[Action, Action], float] | None = None,
    patience: float = 0.0,
) -> Schedule:
    """The schedule in which rank r runs the actions `placement[r]`, which are in the order that it prefers.

    Which passes there are says whether weight gradients are put off: B, or I and W. `costs`: of each action, in any unit;
    `travel`: in that unit, of what one action makes for another one on another rank. `cap[r]` is the most that rank r may
    keep, where a forward keeps `kept` until its B or W, and its I leaves `put_off` of it; none is no limit. Raises ConfigError
    where a cap has no room for one micro-batch, order.Stuck where actions wait for what is not there.
    """
    draft = Schedule(tuple(stages), tuple(map(tuple, placement)))
    known = graph(draft, costs, travel)
    limit = None if cap is None else cap_of(known, cap, kept, put_off)
    if limit is not None:
        limit.check()
    return schedule_of(draft, known, list_schedule(known, range(len(known.actions)), limit, patience=patience))


def schedule_of(draft: Schedule, known: Graph, built: Built) -> Schedule:
    """The stages of a draft with the orders that were built."""
    return Schedule(draft.stages, tuple(tuple(known.actions[i] for i in order) for order in built.orders))


def list_schedule(
    known: Graph,
    rank_of: Sequence[int],
    cap: Cap | None = None,
    chains: Sequence[Sequence[int]] = (),
    patience: float = 0.0,
) -> Built:
    """Run a graph against the clock. `rank_of[i]`: the lower, the more action i is preferred.

    `chains`: actions that stay in this order. Raises Stuck where they cannot.
    """
    waits, behind = list(known.waits), [-1] * len(known.actions)
    for chain in chains:
        for i, j in itertools.pairwise(chain):
            behind[i], waits[j] = j, waits[j] + 1
    rank, takes, followers = known.rank, known.takes, known.followers
    arrival, start = [0] * len(waits), [-1] * len(waits)
    kept = None if cap is None else Kept(cap)
    ready: list[list[tuple[int, int]]] = [[] for _ in range(known.ranks)]  # heaps of (preference, action)
    coming: list[list[tuple[int, int, int]]] = [[] for _ in range(known.ranks)]  # heaps of (when, preference, action)
    free, orders = [0] * known.ranks, [[] for _ in range(known.ranks)]  # type: list[int], list[list[int]]
    for i, count in enumerate(waits):
        if not count:
            heapq.heappush(ready[rank[i]], (rank_of[i], i))
    moments = [(0, r) for r in range(known.ranks)]  # a heap of (when, rank that may be free)
    while moments:
        now, r = heapq.heappop(moments)
        if free[r] > now:
            continue
        soon, here = coming[r], ready[r]
        while soon and soon[0][0] <= now:
            heapq.heappush(here, heapq.heappop(soon)[1:])
        chosen = _choose(here, r, kept)
        if chosen is None:
            if soon:
                heapq.heappush(moments, (soon[0][0], r))
            continue
        i = chosen[1]
        if patience and soon:
            better = _better(soon, chosen, now + patience * takes[i], r, kept)
            if better is not None:
                heapq.heappush(here, chosen)
                heapq.heappush(moments, (better, r))
                continue
        start[i], end = now, now + takes[i]
        free[r] = end
        orders[r].append(i)
        if kept is not None:
            kept.take(i, r)
        heapq.heappush(moments, (end, r))
        for j, travels in _freed(followers[i], behind[i]):
            arrival[j] = max(arrival[j], end + travels)
            waits[j] -= 1
            if not waits[j]:
                other = rank[j]
                heapq.heappush(coming[other], (arrival[j], rank_of[j], j))
                heapq.heappush(moments, (max(arrival[j], free[other]), other))
    if min(start, default=0) < 0:
        raise Stuck([len(order) for order in orders])
    return Built(tuple(start), tuple(map(tuple, orders)), max(free))


def _choose(here: list[tuple[int, int]], rank: int, kept: Kept | None) -> tuple[int, int] | None:
    """Take out of a heap the most preferred that there is room for."""
    if kept is None:
        return heapq.heappop(here) if here else None
    aside = []
    chosen = None
    while here:
        first = heapq.heappop(here)
        if kept.has_room(first[1], rank):
            chosen = first
            break
        aside.append(first)
    for each in aside:
        heapq.heappush(here, each)
    return chosen


def _better(
    soon: list[tuple[int, int, int]], chosen: tuple[int, int], until: float, rank: int, kept: Kept | None
) -> int | None:
    """When the first comes that is preferred to what was chosen, if that is before `until`."""
    found = [
        when
        for when, preference, i in soon
        if when < until and preference < chosen[0] and (kept is None or kept.has_room(i, rank))
    ]
    return min(found, default=None)


def _freed(followers: Sequence[tuple[int, int]], behind: int) -> Sequence[tuple[int, int]]:
    return followers if behind < 0 else (*followers, (behind, 0))
