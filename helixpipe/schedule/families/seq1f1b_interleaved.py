"""Seq1F1B-I (arXiv 2406.03488, section 3): interleaved 1F1B whose unit is a segment of a micro-batch.

Stage c*p + r on rank r. Groups of g = k*ceil(p/k) units, all segments of enough micro-batches to fill the
ranks, go through chunk 0 of all ranks, then chunk 1, ...; rank r runs (v-1)g + 2(p-r-1) + k-1 forwards of a
stage, then one forward, one backward. Segments run backwards in reverse.

    p=3, m=1, k=3, v=2, one column a unit of time, F = B = 1; 0F0.1 is segment 1 of micro-batch 0:

    rank 0   0F0   0F0.1 0F0.2 3F0   3F0.1 3F0.2 ..... ..... ..... ..... 3B0.2 3B0.1 3B0   0B0.2 0B0.1 0B0
    rank 1   ..... 1F0   1F0.1 1F0.2 4F0   4F0.1 4F0.2 ..... ..... 4B0.2 4B0.1 4B0   1B0.2 1B0.1 1B0
    rank 2   ..... ..... 2F0   2F0.1 2F0.2 5F0   5F0.1 5F0.2 5B0.2 5B0.1 5B0   2B0.2 2B0.1 2B0

Bubble (p-1)(f+b)/(kv) and at most 1 + 2(p-1)/(kv) micro-batches kept, where k >= p, segments cost the same
and g divides mk. The authors' code groups p units, which deadlocks where k does not divide p. Where g does not
divide mk and mk > p, groups are a little larger: the same bubble, more kept. With mk < p ranks wait for more.

Its warm-up leaves twice Seq1F1B's room between ranks. That is worth memory where segments cost the same in all,
but not in forward and backward each (attention's backward is 2.5 forwards, the rest's 2): no rank then waits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.families.looped import interleave, looped
from helixpipe.schedule.families.units import check_segments
from helixpipe.schedule.schedule import Schedule


def seq1f1b_interleaved(
    ranks: int,
    layers: int,
    microbatches: int,
    segments: int = 2,
    stages_per_rank: int = 2,
    group: int = 0,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`segments` is k, `stages_per_rank` v, `group` g in units, a multiple of k; 0 chooses. See interleaved."""
    check_segments(segments, opaque)
    return interleave(ranks, microbatches, segments, looped(ranks, layers, stages_per_rank, opaque, ends), group)
