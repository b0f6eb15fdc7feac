"""Seq1F1B (arXiv 2406.03488, section 3): 1F1B whose unit is a segment of a micro-batch.

Stage r on rank r. Forwards take micro-batches and their segments in order, backwards each micro-batch's
segments reversed: keys and values flow forwards from segment to segment, their gradients back. Rank r runs
p-r-2+k forwards, then one forward, one backward.

    p=3, m=2, k=2, one column a unit of time, F = B = 1; F0.1 is segment 1 of micro-batch 0:

    rank 0   F0   F0.1 F1   F1.1 .... .... B0.1 .... B0   .... B1.1 B1
    rank 1   .... F0   F0.1 F1   .... B0.1 F1.1 B0   .... B1.1 B1
    rank 2   .... .... F0   F0.1 B0.1 F1   B0   F1.1 B1.1 B1

Bubble (p-1)(f+b)/k where segments cost the same; min(p-r-1+k, mk)/k micro-batches kept on rank r. With causal
attention a later segment of as many tokens costs more: see `partition` for lengths that balance them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.families.units import backward_units, check_segments, forward_units, take_turns
from helixpipe.schedule.schedule import Schedule


def seq1f1b(
    ranks: int,
    layers: int,
    microbatches: int,
    segments: int = 2,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`segments` is k; 1 is plain 1F1B. `opaque`: see gpipe. `ends`: see split_layers."""
    check_segments(segments, opaque)
    orders = []
    for rank in range(ranks):
        forwards = [Action(rank, Pass.F, *unit) for unit in forward_units(range(microbatches), segments)]
        backwards = [Action(rank, Pass.B, *unit) for unit in backward_units(range(microbatches), segments)]
        orders.append(tuple(take_turns(forwards, backwards, ranks - rank - 2 + segments)))
    return Schedule(split_layers(layers, ranks, opaque, ends), tuple(orders))
