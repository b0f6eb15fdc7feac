"""ZB-V (arXiv 2405.15362; the search is that of 2401.10241): no bubble in the memory of 1F1B, when F = I = W.

Rank r holds stages r and 2p-1-r. Built greedily: each rank in turn takes an I, then an F, of whichever chunk the
others have brought it to; a W fills a gap it fits in, makes room when the rank keeps as much as 1F1B would, and
fills part of a gap when this rank has stood still for less than the one that stood still most.

    p=3, m=3, one column a unit of time, F = I = W = 1:

    rank 0   0F0 0F1 0F2 ... ... 5F0 5I0 5F1 5I1 5F2 5I2 0I0 5W0 0I1 5W1 0I2 5W2 0W0 0W1 0W2
    rank 1   ... 1F0 1F1 1F2 4F0 ... 4F1 4I0 4F2 4I1 1I0 4I2 1I1 4W0 1I2 4W1 1W0 4W2 1W1 1W2
    rank 2   ... ... 2F0 3F0 2F1 3F1 2F2 3F2 3I0 2I0 3I1 2I1 3I2 2I2 3W0 2W0 3W1 2W1 3W2 2W2

From a rank's first action to its last: no bubble for F = I = W and m >= 2p-1. p micro-batches kept on every rank.
`costs` are the times of F, I and W of one stage, in any unit. The further they are apart, the more bubble: where
attention, which has no weights, is most of the work (long sequences), I > F > W and this is not the family.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Pass
from helixpipe.schedule.families.v_shape import CHUNKS, Bench, v_stages
from helixpipe.schedule.schedule import Schedule


def zb_v(
    ranks: int,
    layers: int,
    microbatches: int,
    costs: Sequence[float] = (1, 1, 1),
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """The best of a few greedy ones under `costs`. `opaque`: see gpipe. `ends`: see split_layers."""
    stages = v_stages(ranks, layers, opaque, ends)
    tries = []
    for before in itertools.product((True, False), (True, False)):
        first = _build(ranks, microbatches, costs, before, [0.0] * ranks)
        # again, with the gaps known that each rank will have anyway
        tries += [first, _build(ranks, microbatches, costs, before, first.idle)]
    best = min(tries, key=lambda bench: max(bench.idle))
    return best.schedule(stages)


def _build(
    ranks: int, microbatches: int, costs: Sequence[float], before: tuple[bool, bool], expected: Sequence[float]
) -> Bench:
    """`before`: whether a W may fill part of a gap before an I of chunk 1, and before an F.

    `expected` are the ranks' gaps in an earlier try.
    """
    bench = Bench(ranks, microbatches, costs)
    _warm_up(bench)
    while not bench.complete():
        for rank, chunk in _backwards(bench):
            if bench.arrival(rank, Pass.I, chunk) is not None:
                _fill(bench, rank, Pass.I, chunk, chunk == 0 or before[0], expected)
                bench.put(rank, Pass.I, chunk)
        for rank in range(ranks):
            chunk = _forward(bench, rank)
            if bench.arrival(rank, Pass.F, chunk) is not None and _make_room(bench, rank, chunk):
                _fill(bench, rank, Pass.F, chunk, before[1], expected)
                bench.put(rank, Pass.F, chunk)
    return bench


def _warm_up(bench: Bench) -> None:
    """Forwards before the first I: 2(p-r)-1 of chunk 0, then r+1 of chunk 1 with one of chunk 0 between them."""
    rows = [deque([0] * (2 * (bench.ranks - rank) - 1) + [1, 0] * rank + [1]) for rank in range(bench.ranks)]
    while any(rows):
        for rank, row in enumerate(rows):
            while row and (bench.all_done(rank, Pass.F, row[0]) or bench.arrival(rank, Pass.F, row[0]) is not None):
                chunk = row.popleft()
                if not bench.all_done(rank, Pass.F, chunk):
                    bench.put(rank, Pass.F, chunk)


def _backwards(bench: Bench) -> list[tuple[int, int]]:
    """(rank, chunk) of the next I of every rank, so that one which brings another its inputs comes first."""
    chunk_of = []
    for rank in range(bench.ranks):
        behind = bench.done(rank, Pass.I, 0) < bench.done(rank, Pass.I, 1)
        brought = bench.arrival(rank, Pass.I, 0) is not None or bench.all_done(rank, Pass.I, 1)
        chunk_of.append(0 if behind and (brought or rank == bench.ranks - 1) else 1)
    up = [(rank, 0) for rank in reversed(range(bench.ranks)) if chunk_of[rank] == 0]
    return up + [(rank, 1) for rank in range(bench.ranks) if chunk_of[rank] == 1]


def _forward(bench: Bench, rank: int) -> int:
    """The chunk of the rank's next F: 1 when it can be, since that is what backwards wait for."""
    behind = bench.done(rank, Pass.F, 1) < bench.done(rank, Pass.F, 0)
    return 1 if behind and bench.arrival(rank, Pass.F, 1) is not None else 0


def _make_room(bench: Bench, rank: int, chunk: int) -> bool:
    """Run W's until one more forward can be kept; False when none is left to run.

    Chunk 0 takes the last room only when an I is about to free some, or chunk 1 might never get any.
    """

    freeing = any(bench.arrival(rank, Pass.I, c) is not None for c in CHUNKS)

    def full() -> bool:
        kept, room = bench.kept[rank], 2 * bench.ranks
        return sum(kept) >= room or (chunk == 0 and kept[0] >= room - 1 and not freeing)

    while full() and bench.weights[rank]:
        bench.put_weight(rank)
    return not full()


def _fill(bench: Bench, rank: int, kind: Pass, chunk: int, partly: bool, expected: Sequence[float]) -> None:
    """Run W's while the rank would stand still before this action."""
    arrival = bench.arrival(rank, kind, chunk)
    assert arrival is not None
    while bench.weights[rank] and bench.free[rank] + bench.cost[Pass.W] <= arrival:
        bench.put_weight(rank)
    slack = max(*bench.idle, max(expected) - expected[rank]) - bench.idle[rank]
    if partly and bench.weights[rank] and arrival - bench.free[rank] > slack:
        bench.put_weight(rank)
