"""Layers to stages by what they cost, where layers differ: runs of whole layers whose dearest rank costs least.

    costs    3 1 1 3 1 1 3 1        two ranks of one stage       3 1 1 3 | 1 1 3 1           8 and 6
                                    of two stages, looped        3 | 1 1 3 | 1 1 | 3 1      5 and 9, and then
                                                                 3 1 | 1 3 | 1 1 | 3 1       6 and 8, and so on

First the dearest stage is as cheap as can be; then one stage has a layer less and another one more while the dearest rank gains,
from there and from as many layers each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

BISECTIONS = 50


def cut_by_cost(costs: Sequence[float], ends: Sequence[float], ranks: Sequence[int]) -> list[int]:
    """Layers of each stage. `costs`: of each layer; `ends`: of what precedes the first and follows the last one, in the same
    unit; `ranks`: of each stage its rank. A stage has a layer at least; one with an end that costs something may have none.
    """
    stages = len(ranks)
    least = [0 if stages > 1 and end else 1 for end in (ends[0], *(0.0,) * (stages - 2), ends[1])][:stages]
    beside = [0.0] * stages
    beside[0] += ends[0]
    beside[-1] += ends[1]
    low, high = 0.0, (sum(costs) + sum(ends)) * (1 + 1e-9)  # in whatever order they are added
    best = _filled(costs, beside, least, high)
    assert best is not None  # a bound above all costs holds any cut
    for _ in range(BISECTIONS):
        bound = (low + high) / 2
        found = _filled(costs, beside, least, bound)
        if found is None:
            low = bound
        else:
            best, high = found, bound
    alike = [len(costs) * (s + 1) // stages - len(costs) * s // stages for s in range(stages)]
    starts = [best] if min(alike) < 1 else [best, alike]
    return min(_moved(costs, beside, least, ranks, start) for start in starts)[1]


def _filled(costs: Sequence[float], beside: Sequence[float], least: Sequence[int], bound: float) -> list[int] | None:
    """Each stage as many layers as the bound allows; None where they do not go in."""
    found, at = [], 0
    for stage, other in enumerate(beside):
        left = len(costs) - sum(least[stage + 1 :])  # where later ones must begin
        total, count = other, 0
        while at < left and (count < least[stage] or total + costs[at] <= bound):
            total, count, at = total + costs[at], count + 1, at + 1
        if total > bound * (1 + 1e-12) or count < least[stage]:
            return None
        found.append(count)
    return found if at == len(costs) else None


def _moved(
    costs: Sequence[float], beside: Sequence[float], least: Sequence[int], ranks: Sequence[int], counts: list[int]
) -> tuple[tuple[float, ...], list[int]]:
    """What it is worth, and the layers: one stage a layer less and another one more, while that makes the dearest rank cheaper, or as dear and all more alike."""
    before = [0.0, *itertools.accumulate(costs)]
    stages = range(len(counts))

    def worth(counts: Sequence[int]) -> tuple[float, ...]:
        by_rank, dearest, at = [0.0] * (max(ranks) + 1), 0.0, 0
        for stage, count in enumerate(counts):
            cost = beside[stage] + before[at + count] - before[at]
            by_rank[ranks[stage]] += cost
            dearest, at = max(dearest, cost), at + count
        return round(max(by_rank), 9), round(sum(each**2 for each in by_rank), 9), round(dearest, 9)

    best = worth(counts)
    while True:
        tried = [(best, counts)]
        for giver, taker in itertools.permutations(stages, 2):
            if counts[giver] > least[giver]:
                moved = list(counts)
                moved[giver], moved[taker] = moved[giver] - 1, moved[taker] + 1
                tried.append((worth(moved), moved))
        found = min(tried)
        if found[0] >= best:
            return best, counts
        best, counts = found
