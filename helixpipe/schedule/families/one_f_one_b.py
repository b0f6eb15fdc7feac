"""1F1B (PipeDream-Flush, arXiv 2006.09503): as few forwards ahead as keep every rank fed.

    p=3, m=4, one column a unit of time, F = B = 1:

    rank 0   F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    rank 1   .. F0 F1 .. B0 F2 B1 F3 B2 .. B3
    rank 2   .. .. F0 B0 F1 B1 F2 B2 F3 B3

Bubble (p-1)(f+b); min(p-r, m) micro-batches kept on rank r.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.schedule import Schedule


def one_f_one_b(
    ranks: int, layers: int, microbatches: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> Schedule:
    """Stage r on rank r: p-r-1 forwards to warm up, then one forward, one backward.

    `opaque`: see gpipe. `ends`: see split_layers.
    """
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, microbatches)
        order = [Action(rank, Pass.F, mb) for mb in range(ahead)]
        for mb in range(microbatches):
            if mb + ahead < microbatches:
                order.append(Action(rank, Pass.F, mb + ahead))
            order.append(Action(rank, Pass.B, mb))
        orders.append(tuple(order))
    return Schedule(split_layers(layers, ranks, opaque, ends), tuple(orders))
