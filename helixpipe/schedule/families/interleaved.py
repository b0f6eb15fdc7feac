"""Interleaved 1F1B (Megatron-LM, arXiv 2104.04473, section 2.2): v stages a rank, so the bubble is v times smaller.

Stage c*p + r on rank r. Groups of p micro-batches go through chunk 0 of all ranks, then chunk 1, ...; rank r
runs (v-1)p + 2(p-r-1) forwards of a stage, then one forward, one backward.

    p=3, m=3, v=2, one column a unit of time, F = B = 1:

    rank 0   0F0 0F1 0F2 3F0 3F1 3F2 ... ... 3B0 ... 3B1 ... 3B2 0B0 0B1 0B2
    rank 1   ... 1F0 1F1 1F2 4F0 4F1 4F2 4B0 ... 4B1 ... 4B2 1B0 1B1 1B2
    rank 2   ... ... 2F0 2F1 2F2 5F0 5B0 5F1 5B1 5F2 5B2 2B0 2B1 2B2

Bubble (p-1)(f+b)/v where p divides m; ((v-1)p + 2(p-r-1) + 1)/v micro-batches kept on rank r. Where p does not
divide m and m > p, groups are a little larger: the same bubble, more kept. With m < p ranks wait for more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.families.looped import interleave, looped
from helixpipe.schedule.families.one_f_one_b import one_f_one_b
from helixpipe.schedule.schedule import Schedule


def interleaved(
    ranks: int,
    layers: int,
    microbatches: int,
    stages_per_rank: int = 2,
    group: int = 0,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`stages_per_rank` is v; 1 is plain 1F1B. `group`: micro-batches that go together, at least p; 0 chooses.

    A `group` given leaves a short one at the end where it does not divide m: less kept, more bubble.
    """
    if stages_per_rank == 1:
        return one_f_one_b(ranks, layers, microbatches, opaque, ends)
    return interleave(ranks, microbatches, 1, looped(ranks, layers, stages_per_rank, opaque, ends), group)
