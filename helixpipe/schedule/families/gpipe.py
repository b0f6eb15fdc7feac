"""GPipe (arXiv 1811.06965): all forwards, then all backwards.

    p=3, m=4, one column a unit of time, F = B = 1:

    rank 0   F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3
    rank 1   .. F0 F1 F2 F3 .. .. B0 B1 B2 B3
    rank 2   .. .. F0 F1 F2 F3 B0 B1 B2 B3

Bubble (p-1)(f+b); m micro-batches kept on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.schedule import Schedule


def gpipe(
    ranks: int, layers: int, microbatches: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> Schedule:
    """Stage r on rank r. `opaque` names the layers that are one `block`; `ends`: see split_layers."""
    orders = [
        [Action(rank, kind, mb) for kind in (Pass.F, Pass.B) for mb in range(microbatches)] for rank in range(ranks)
    ]
    return Schedule(split_layers(layers, ranks, opaque, ends), tuple(map(tuple, orders)))
