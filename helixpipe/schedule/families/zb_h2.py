"""ZB-H2 (arXiv 2401.10241, section 2): no bubble between a rank's first action and its last, for twice the memory.

Stage r on rank r: 2(p-r)-1 forwards before the first backward, which keeps the rank busy until that comes; W runs
2r micro-batches late, so that all ranks keep as much and the last ones work through W at the end.

    p=3, m=5, one column a unit of time, F = I = W = 1:

    rank 0   F0 F1 F2 F3 F4 I0 W0 I1 W1 I2 W2 I3 W3 I4 W4
    rank 1   .. F0 F1 F2 I0 F3 I1 F4 I2 W0 I3 W1 I4 W2 W3 W4
    rank 2   .. .. F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4

Each rank starts r later and ends r later than rank 0: no bubble where nothing stops all ranks at once between
steps (the paper's measure), (p-1)f where something does. 2p-1 micro-batches kept on every rank. For F = I = W and m >= 2p-1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.families.units import split_backwards, take_turns
from helixpipe.schedule.schedule import Schedule


def zb_h2(
    ranks: int, layers: int, microbatches: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> Schedule:
    """`opaque`: see gpipe. `ends`: see split_layers. With fewer than 2p-1 micro-batches some bubble remains."""
    orders = []
    for rank in range(ranks):
        forwards = [Action(rank, Pass.F, mb) for mb in range(microbatches)]
        backwards = [Action(rank, Pass.I, mb) for mb in range(microbatches)]
        turns = take_turns(forwards, backwards, 2 * (ranks - rank) - 2)
        orders.append(tuple(split_backwards(turns, late=2 * rank)))
    return Schedule(split_layers(layers, ranks, opaque, ends), tuple(orders))
