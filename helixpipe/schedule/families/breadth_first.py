"""Breadth-first pipeline (arXiv 2211.05953): all micro-batches through a chunk before the next chunk.

Stage c*p + r on rank r. All m forwards of chunk 0, then of chunk 1, ...; then all backwards of the last chunk,
and so on to the first.

    p=3, m=3, v=2, one column a unit of time, F = B = 1:

    rank 0   0F0 0F1 0F2 3F0 3F1 3F2 ... ... ... ... 3B0 3B1 3B2 0B0 0B1 0B2
    rank 1   ... 1F0 1F1 1F2 4F0 4F1 4F2 ... ... 4B0 4B1 4B2 1B0 1B1 1B2
    rank 2   ... ... 2F0 2F1 2F2 5F0 5F1 5F2 5B0 5B1 5B2 2B0 2B1 2B2

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
    """`stages_per_rank` is v; 1 is GPipe. `opaque`: see gpipe. `ends`: see split_layers."""
    chunks = range(stages_per_rank)
    steps = [(chunk, Pass.F) for chunk in chunks] + [(chunk, Pass.B) for chunk in reversed(chunks)]
    orders = [
        tuple(Action(chunk * ranks + rank, kind, mb) for chunk, kind in steps for mb in range(microbatches))
        for rank in range(ranks)
    ]
    return Schedule(looped(ranks, layers, stages_per_rank, opaque, ends), tuple(orders))
