"""ZB-H1 (arXiv 2401.10241, section 2): 1F1B whose weight gradients wait, in the memory of 1F1B.

Stage r on rank r. 1F1B's order; a backward is split in I, the gradient of its inputs, which others wait for, and
W, of its weights, which nobody waits for. Rank r runs W r micro-batches late, as much as rank 0 keeps more.

    p=3, m=3, one column a unit of time, F = I = W = 1:

    rank 0   F0 F1 F2 .. .. I0 W0 I1 W1 I2 W2
    rank 1   .. F0 F1 .. I0 F2 I1 W0 I2 W1 W2
    rank 2   .. .. F0 I0 F1 I1 F2 I2 W0 W1 W2

Bubble (p-1)(f+b-2w), where m >= p, b = i + w, f >= w and i >= w; p micro-batches kept on every rank. The paper writes
B for I.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.families.seq1f1b_zb import seq1f1b_zb
from helixpipe.schedule.schedule import Schedule


def zb_h1(
    ranks: int, layers: int, microbatches: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> Schedule:
    """`opaque`: see gpipe. `ends`: see split_layers."""
    return seq1f1b_zb(ranks, layers, microbatches, 1, opaque, ends)
