"""TeraPipe (arXiv 2102.07988): all segments forward, then all backward.

Stage r on rank r. GPipe whose unit is a segment of a micro-batch; backwards take each micro-batch's segments in
reverse.

    p=3, m=2, k=2, one column a unit of time, F = B = 1; F0.1 is segment 1 of micro-batch 0:

    rank 0   F0   F0.1 F1   F1.1 .... .... .... .... B0.1 B0   B1.1 B1
    rank 1   .... F0   F0.1 F1   F1.1 .... .... B0.1 B0   B1.1 B1
    rank 2   .... .... F0   F0.1 F1   F1.1 B0.1 B0   B1.1 B1

Bubble (p-1)(f+b)/k where segments cost the same; m micro-batches kept on every rank. The paper cuts so that
t_1 + ... + t_k + (p-1) max t is least, by measured costs: `partition.pipelined`, from Python. Commands cut as for the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.families.units import backward_units, check_segments, forward_units
from helixpipe.schedule.schedule import Schedule


def terapipe(
    ranks: int,
    layers: int,
    microbatches: int,
    segments: int = 2,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`segments` is k; 1 is GPipe. `opaque`: see gpipe. `ends`: see split_layers."""
    check_segments(segments, opaque)
    units = range(microbatches)
    steps = [(Pass.F, *unit) for unit in forward_units(units, segments)]
    steps += [(Pass.B, *unit) for unit in backward_units(units, segments)]
    orders = tuple(tuple(Action(rank, *step) for step in steps) for rank in range(ranks))
    return Schedule(split_layers(layers, ranks, opaque, ends), orders)
