"""V-Half (arXiv 2405.15362, section 3): half the memory of 1F1B.

Rank r holds stages r and 2p-1-r. A block of F0, F1, I1, I0 of one micro-batch (F0: forward of the rank's chunk 0),
at times chosen so that a chunk's activations live as long on every rank on average, is repeated every 6 units:

    block of rank r    F0 at 2r, F1 at 3p-2-r, I1 at 3p+d+2r-1, I0 at 6p+d-2-r        d = 3 if p is even, else 0

The repeated blocks say which action comes first; each rank then takes the first that is ready and fits into the
memory that the blocks need, W when there is none.

    p=2, m=4, one column a unit of time, F = I = W = 1:

    rank 0   0F0 0F1 0F2 3F0 3I0 3W0 3F1 0I0 3I1 0W0 0F3 3W1 3F2 0I1 3I2 0W1 3W2 3F3 3I3 0I2 3W3 0I3 0W2 0W3
    rank 1   ... 1F0 2F0 1F1 2F1 2I0 1I0 2W0 1W0 1F2 2F2 2I1 1I1 2W1 1W1 1F3 2F3 2I2 1I2 2I3 1I3 2W2 1W2 2W3 1W3

About (p+2)/2 micro-batches kept on every rank: 6 of 8 half-stages for p=4, 10 of 16 for p=8. With F = I = W
it takes 53 units for p=4, m=8 (48 without bubble) and 113 for p=8, m=16 (96). `costs` as in zb_v.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.schedule.action import Pass
from helixpipe.schedule.families.blocks import PERIOD, Block
from helixpipe.schedule.families.v_shape import CHUNKS, Bench, v_stages
from helixpipe.schedule.schedule import Schedule


def v_half(
    ranks: int,
    layers: int,
    microbatches: int,
    costs: Sequence[float] = (1, 1, 1),
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
) -> Schedule:
    """`costs` are the times of F, I and W of one stage. `opaque`: see gpipe. `ends`: see split_layers."""
    stages = v_stages(ranks, layers, opaque, ends)
    blocks = [_block(rank, ranks) for rank in range(ranks)]
    bench = Bench(ranks, microbatches, costs)
    room = max(block.kept(0) + block.kept(1) for block in blocks)
    now = 0.0
    while not bench.complete():
        for rank in range(ranks):
            if bench.free[rank] <= now:
                _take(bench, rank, blocks[rank], room, now)
        now = min((free for free in bench.free if free > now), default=now)
    return bench.schedule(stages)


def _block(rank: int, ranks: int) -> Block:
    shift = 3 if ranks % 2 == 0 else 0
    return Block(2 * rank, 3 * ranks - 2 - rank, 3 * ranks + shift + 2 * rank - 1, 6 * ranks + shift - 2 - rank)


def _take(bench: Bench, rank: int, block: Block, room: int, now: float) -> None:
    """Start the first action of the repeated blocks that is ready, else a W, else nothing."""
    ready = []
    for chunk in CHUNKS:
        for kind in (Pass.F, Pass.I):
            at = bench.arrival(rank, kind, chunk)
            if at is not None and at <= now and (kind is Pass.I or _fits(bench, rank, chunk, block, room)):
                ready.append((block.offset(kind, chunk) + PERIOD * bench.done(rank, kind, chunk), kind, chunk))
    if ready:
        bench.put(rank, *min(ready)[1:])
    elif bench.weights[rank]:
        bench.put_weight(rank)


def _fits(bench: Bench, rank: int, chunk: int, block: Block, room: int) -> bool:
    """Whether one more forward can be kept; chunk 0 leaves the room that chunk 1 needs."""
    kept = bench.kept[rank]
    return sum(kept) < room and (chunk == 1 or kept[0] < room - block.kept(1))
