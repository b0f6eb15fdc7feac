"""Seq1F1B with zero bubble (arXiv 2406.03488 with the split backward of 2401.10241): weight gradients fill the holes.

Stage r on rank r, and Seq1F1B's order of forwards and backwards; a backward is split in I, the gradient of its
inputs, which others wait for, and W, of its weights, which nobody waits for. Rank r runs W r units late.

    p=3, m=1, k=3, one column a unit of time, F = I = W = 1; F0.1 is segment 1 of micro-batch 0:

    rank 0   F0   F0.1 F0.2 .... .... .... .... I0.2 W0.2 I0.1 W0.1 I0   W0
    rank 1   .... F0   F0.1 F0.2 .... .... I0.2 I0.1 W0.2 I0   W0.1 W0
    rank 2   .... .... F0   F0.1 F0.2 I0.2 I0.1 I0   W0.2 W0.1 W0

Bubble (p-1)(f+b-2w)/k, where mk >= p-1+k, b = i + w, f >= w, i >= w and segments cost the same; (p-1+k)/k
micro-batches kept on every rank, or all m where that is less. `zb_h1` is this with one segment.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.families.units import backward_units, check_segments, forward_units, split_backwards, take_turns
from helixpipe.schedule.schedule import Schedule


def seq1f1b_zb(
    ranks: int,
    layers: int,
    microbatches: int,
    segments: int = 2,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`segments` is k. `opaque`: see gpipe. `ends`: see split_layers."""
    check_segments(segments, opaque)
    orders = []
    for rank in range(ranks):
        forwards = [Action(rank, Pass.F, *unit) for unit in forward_units(range(microbatches), segments)]
        backwards = [Action(rank, Pass.I, *unit) for unit in backward_units(range(microbatches), segments)]
        turns = take_turns(forwards, backwards, ranks - rank - 2 + segments)
        orders.append(tuple(split_backwards(turns, late=rank)))
    return Schedule(split_layers(layers, ranks, opaque, ends), tuple(orders))
