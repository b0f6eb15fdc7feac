"""V-Min (arXiv 2405.15362, section 3): a third of the memory of 1F1B, for a larger bubble.

Rank r holds stages r and 2p-1-r. A block of F0, F1, I1, I0 of one micro-batch (F0: forward of the rank's chunk 0)
that goes down the ranks and up again, twice, without waiting, is repeated every 6 units; W in the holes:

    block of rank r    F0 at r, F1 at 2p-1-r, I1 at 2p+d+r, I0 at 4p+d-1-r        d = 2 if 3 divides p, else 0

    p=2, m=3, one column a unit of time, F = I = W = 1:

    rank 0   0F0 ... ... 3F0 3I0 3W0 0F1 0I0 0W0 3F1 3I1 3W1 0F2 0I1 0W1 3F2 3I2 3W2 ... 0I2 0W2
    rank 1   ... 1F0 2F0 ... ... 2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2 2W2 1W2

About (p+4)/3 micro-batches kept on every rank: 4 of 8 half-stages for p=4, 8 of 16 for p=8. With F = I = W
it takes 59 units for p=4, m=8 (48 without bubble) and 123 for p=8, m=16 (96).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.families.blocks import Block, repeat
from helixpipe.schedule.families.v_shape import v_stages
from helixpipe.schedule.schedule import Schedule


def v_min(
    ranks: int, layers: int, microbatches: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> Schedule:
    """`opaque`: see gpipe. `ends`: see split_layers."""
    blocks = [_block(rank, ranks) for rank in range(ranks)]
    return Schedule(v_stages(ranks, layers, opaque, ends), repeat(blocks, microbatches))


def _block(rank: int, ranks: int) -> Block:
    shift = 2 if ranks % 3 == 0 else 0
    return Block(rank, 2 * ranks - 1 - rank, 2 * ranks + shift + rank, 4 * ranks + shift - 1 - rank)
