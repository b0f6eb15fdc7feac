"""SlimPipe (arXiv 2504.14519): interleaved 1F1B over slices of one length.

Seq1F1B-I's placement and order: `seq1f1b_interleaved` with segments of even length, `partition.even`.

    p=2, m=1, k=4, v=2, one column a unit of time, F = B = 1; 0F0.1 is slice 1 of micro-batch 0:

    rank 0   0F0   0F0.1 0F0.2 0F0.3 2F0   2F0.1 2F0.2 2F0.3 ..... ..... 2B0.3 2B0.2 2B0.1 2B0   0B0.3 0B0.2 0B0.1 0B0
    rank 1   ..... 1F0   1F0.1 1F0.2 1F0.3 3F0   3F0.1 3F0.2 3F0.3 3B0.3 3B0.2 3B0.1 3B0   1B0.3 1B0.2 1B0.1 1B0

Bubble (p-1)(f+b)/(kv) and at most 1 + 2(p-1)/(kv) micro-batches kept, where k >= p and slices cost the same. Under
causal attention slices of one length do not; the paper moves attention between ranks to balance them. That is not
here: use seq1f1b_interleaved with the computation-wise partition, which needs no such messages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.families.seq1f1b_interleaved import seq1f1b_interleaved
from helixpipe.schedule.schedule import Schedule


def slimpipe(
    ranks: int,
    layers: int,
    microbatches: int,
    segments: int = 4,
    stages_per_rank: int = 2,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`segments` is k, `stages_per_rank` v. `opaque`: see gpipe. `ends`: see split_layers."""
    return seq1f1b_interleaved(ranks, layers, microbatches, segments, stages_per_rank, 0, opaque, ends)
