"""Breadth-first pipeline (arXiv 2211.05953): all micro-batches through a chunk before the next chunk.

Stage c*p + r on rank r. All m forwards of chunk 0, then of chunk 1, ...; the backward is the mirror: the last chunk
and the last micro-batch first.

    p=3, m=3, v=2, one column a unit of time, F = B = 1:

    rank 0   0F0 0F1 0F2 3F0 3F1 3F2 ... ... ... ... 3B2 3B1 3B0 0B2 0B1 0B0
    rank 1   ... 1F0 1F1 1F2 4F0 4F1 4F2 ... ... 4B2 4B1 4B0 1B2 1B1 1B0
    rank 2   ... ... 2F0 2F1 2F2 5F0 5F1 5F2 5B2 5B1 5B0 2B2 2B1 2B0

Bubble (p-1)(f+b)/v for m >= p; m micro-batches kept on every rank. Its point is sharded data parallelism: a rank needs
each stage's weights twice a step, in one piece, and reduces its gradients once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.looped import looped
from helixpipe.schedule.schedule import Schedule


def breadth_first(
    ranks: int,
    layers: int,
    microbatches: int,
    stages_per_rank: int = 2,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`stages_per_rank` is v; 1 is GPipe with its backwards mirrored. `opaque`: see gpipe. `ends`: see split_layers."""
    units = [(chunk, mb) for chunk in range(stages_per_rank) for mb in range(microbatches)]
    orders = []
    for rank in range(ranks):
        forwards = [Action(chunk * ranks + rank, Pass.F, mb) for chunk, mb in units]
        orders.append((*forwards, *(action.sibling(Pass.B) for action in reversed(forwards))))
    return Schedule(looped(ranks, layers, stages_per_rank, opaque, ends), tuple(orders))
