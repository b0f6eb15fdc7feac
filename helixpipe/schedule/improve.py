"""Improve: a better order from a good one, within a number of tries and never worse.

    justify    right    ....A.BB..C   every action as late as the others allow, last ones first; then as early as they
               left     A.BBC......   allow, in that order: gaps close in which nothing else could begin
    exchange   the longest chain of actions is found; two that follow one another on one rank in it change places: only
               that can shorten it. The best of some exchanges is made, also where it is no gain, and not taken back for
               a while; where nothing comes of it for long, the search goes on from somewhere near the best

The first is for many actions (Li and Willis, 1992); the second is the search for job shops (Nowicki and Smutnicki, 1996). A try
is one run against the clock. Both know what ranks may keep.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence

from helixpipe.schedule.cap import SLACK, Cap
from helixpipe.schedule.construct import Built, list_schedule
from helixpipe.schedule.graph import Graph
from helixpipe.schedule.order import Stuck

ROUNDS = 6
"""Of justifying, at most; it ends where one brings nothing."""
TABU = 9
"""Exchanges after which one may be taken back."""
MOST_PAIRS = 12
"""Exchanges that are tried before the best of them is made."""
PATIENT = 40
"""Exchanges without gain, after which the search goes on elsewhere: from the best order with SHAKES exchanges anywhere."""
SHAKES = 4

Orders = tuple[tuple[int, ...], ...]


def improve(known: Graph, built: Built, cap: Cap | None, tries: int) -> Built:
    """The best that was found from `built`, which is the best so far."""
    best = built
    for used in range(0, min(2 * ROUNDS, tries - 1), 2):
        found = justify(known, best, cap)
        if found.makespan >= best.makespan:
            tries -= used + 2
            break
        best = found
    else:
        tries -= 2 * ROUNDS
    return exchange(known, best, cap, tries)


def justify(known: Graph, built: Built, cap: Cap | None) -> Built:
    """All actions as late, and then as early, as the others allow."""
    ends = [start + takes for start, takes in zip(built.start, known.takes, strict=True)]
    late = list_schedule(known.backwards, places([-end for end in ends]), None if cap is None else cap.backwards)
    starts = [-(start + takes) for start, takes in zip(late.start, known.takes, strict=True)]
    return list_schedule(known, places(starts), cap)


def places(keys: Sequence[float]) -> list[int]:
    """Of each its place when they are sorted; equals stay as they are."""
    found = [0] * len(keys)
    for place, i in enumerate(sorted(range(len(keys)), key=keys.__getitem__)):
        found[i] = place
    return found


def in_order(known: Graph, orders: Orders) -> Built:
    """Each rank's actions in a given order against the clock. Raises Stuck where it cannot run."""
    waits, behind = list(known.waits), [-1] * len(known.actions)
    for order in orders:
        for i, j in itertools.pairwise(order):
            behind[i], waits[j] = j, waits[j] + 1
    start, takes, followers = [0] * len(waits), known.takes, known.followers
    ready = [i for i, count in enumerate(waits) if not count]
    makespan = done = 0
    while ready:
        i = ready.pop()
        done += 1
        end = start[i] + takes[i]
        makespan = max(makespan, end)
        for j, travels in followers[i]:
            if end + travels > start[j]:
                start[j] = end + travels
            waits[j] -= 1
            if not waits[j]:
                ready.append(j)
        j = behind[i]
        if j >= 0:
            if end > start[j]:
                start[j] = end
            waits[j] -= 1
            if not waits[j]:
                ready.append(j)
    if done < len(waits):
        raise Stuck([0] * len(orders))
    return Built(tuple(start), orders, makespan)


def exchange(known: Graph, built: Built, cap: Cap | None, tries: int) -> Built:
    """Exchanges on the longest chain, so many tried."""
    draw = random.Random(0)  # the same for everybody
    best = now = in_order(known, built.orders)
    if now.makespan > built.makespan:
        best = now = built
    forbidden: deque[tuple[int, int]] = deque(maxlen=TABU)
    vain = 0
    while tries > 0 and best.makespan > known.least:
        pairs = _pairs(known, now)
        moves = []
        for pair in draw.sample(pairs, min(len(pairs), MOST_PAIRS, tries)):
            tries -= 1
            found = _exchanged(known, now, cap, pair)
            if found is not None and (pair[::-1] not in forbidden or found.makespan < best.makespan):
                moves.append((found.makespan, sum(found.start), pair, found))
        vain += 1
        if moves and vain < PATIENT:
            _, _, made, now = min(moves, key=lambda move: move[:3])
            forbidden.append(made)
        else:
            now, vain, tries = _shaken(known, best, cap, draw), 0, tries - SHAKES
            forbidden.clear()
        if now.makespan < best.makespan:
            best, vain = now, 0
    return best


def _pairs(known: Graph, built: Built) -> list[tuple[int, int]]:
    """Actions that follow one another on a rank and on the longest chain, and could do so the other way round."""
    pairs = (pair for run in _runs(known, built) for pair in itertools.pairwise(run))
    return [pair for pair in pairs if not _waits(known, *pair)]


def _shaken(known: Graph, built: Built, cap: Cap | None, draw: random.Random) -> Built:
    """With some exchanges anywhere."""
    for _ in range(SHAKES):
        order = built.orders[draw.randrange(len(built.orders))]
        if len(order) > 1:
            at = draw.randrange(len(order) - 1)
            pair = order[at], order[at + 1]
            built = (None if _waits(known, *pair) else _exchanged(known, built, cap, pair)) or built
    return built


def _waits(known: Graph, first: int, second: int) -> bool:
    return any(j == second for j, _ in known.followers[first])


def _runs(known: Graph, built: Built) -> list[tuple[int, ...]]:
    """One longest chain, cut where it goes from rank to rank."""
    start, takes, before = built.start, known.takes, known.backwards.followers
    ahead = {j: i for order in built.orders for i, j in itertools.pairwise(order)}
    at = next(i for i in range(len(start)) if start[i] + takes[i] == built.makespan)
    runs: list[list[int]] = [[at]]
    while start[at]:
        near = ahead.get(at)
        if near is not None and start[near] + takes[near] == start[at]:
            runs[-1].append(near)
            at = near
            continue
        needed = next((j for j, travels in before[at] if start[j] + takes[j] + travels == start[at]), None)
        if needed is None:
            break  # it starts later than it could
        at = needed
        runs.append([at])
    return [tuple(reversed(run)) for run in runs]


def _exchanged(known: Graph, built: Built, cap: Cap | None, pair: tuple[int, int]) -> Built | None:
    """With two actions that follow one another the other way round; None where that cannot run or keeps too much."""
    rank = known.rank[pair[0]]
    order = list(built.orders[rank])
    at = order.index(pair[0])
    order[at], order[at + 1] = pair[1], pair[0]
    if cap is not None and not fits(cap, order, rank):
        return None
    try:
        return in_order(known, (*built.orders[:rank], tuple(order), *built.orders[rank + 1 :]))
    except Stuck:
        return None


def fits(cap: Cap, order: Sequence[int], rank: int) -> bool:
    """Whether a rank never keeps more than it may."""
    most = max(itertools.accumulate(cap.adds[i] for i in order), default=0.0)
    return most <= cap.limits[rank] * SLACK
