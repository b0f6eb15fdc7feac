"""Chains: an order for each rank in which some of its actions stay in a row, and the others come between as soon as they can be.

What `construct.list_schedule` finds without a cap and without patience where lower numbers are preferred, in a fraction of the
time: a vocabulary on all ranks asks for it several times a schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from heapq import heappop, heappush

from helixpipe.schedule.construct import Built
from helixpipe.schedule.graph import Graph
from helixpipe.schedule.order import Stuck


def in_chains(known: Graph, chains: Sequence[Sequence[int]]) -> Built:
    """Whenever a rank is free it takes, of what has all that it waits for, the lowest number. Raises Stuck."""
    count, ranks = len(known.actions), known.ranks
    waits, behind = list(known.waits), [-1] * count
    for chain in chains:
        for i, j in itertools.pairwise(chain):
            behind[i], waits[j] = j, waits[j] + 1
    rank, takes, followers = known.rank, known.takes, known.followers
    arrival, start, free = [0] * count, [-1] * count, [0] * ranks
    orders: list[list[int]] = [[] for _ in range(ranks)]
    here: list[list[int]] = [[] for _ in range(ranks)]  # heaps of actions
    coming: list[list[int]] = [[] for _ in range(ranks)]  # heaps of when * count + action
    for i in range(count):
        if not waits[i]:
            here[rank[i]].append(i)  # rising: a heap
    moments = list(range(ranks))  # a heap of when * ranks + rank that may be free
    while moments:
        now, r = divmod(heappop(moments), ranks)
        if free[r] > now:
            continue
        mine, soon = here[r], coming[r]
        while soon and soon[0] < (now + 1) * count:
            heappush(mine, heappop(soon) % count)
        if not mine:
            if soon:
                heappush(moments, soon[0] // count * ranks + r)
            continue
        i = heappop(mine)
        start[i], end = now, now + takes[i]
        free[r] = end
        orders[r].append(i)
        heappush(moments, end * ranks + r)
        freed = followers[i] if behind[i] < 0 else (*followers[i], (behind[i], 0))
        for j, travels in freed:
            when = end + travels
            if when > arrival[j]:
                arrival[j] = when
            waits[j] -= 1
            if not waits[j]:
                other = rank[j]
                heappush(coming[other], arrival[j] * count + j)
                if free[other] <= now:  # else it looks when it has ended what it is at
                    heappush(moments, arrival[j] * ranks + other)
    if min(start, default=0) < 0:
        raise Stuck([len(order) for order in orders])
    return Built(tuple(start), tuple(map(tuple, orders)), max(free))
