"""HelixPipe (arXiv 2507.00394): attention parallel pipeline, first in last out.

Attention has no parameters, so it may run anywhere. The block between two attentions, "end of layer l-1,
start of layer l", is on rank l mod p; the attention of layer l for offset d in a group of p
micro-batches is on rank (l+d+1) mod p: offset 0's where the next block is, offset p-1's where this one is.

    p=3, L=3, a group of 3 micro-batches; Pld is block l of offset d, Ald attention of layer l, offset d, one
    column a unit of time, P = A = 1:

    rank 0   P00 P01 P02 A02 A11 A20 P30 P31 P32 | mirrored
    rank 1   ... A00 P10 P11 P12 A12 A21 ... ... |
    rank 2   ... ... A01 A10 P20 P21 P22 A22 ... |

The backward is the exact mirror: first in, last out. `folds`: a group is folds*p micro-batches and each
slot runs the same offset of every fold, so that one fold's messages travel under the other's compute.

Bubble of one naive group (folds=1, section 3): (p-1)(t_pre + t_post), F, B and recompute summed; no
attention in it, and no L/p.

What travels: `none` ships q, k, v to the attention's rank and o back, x beside it; `qkv` ships n and the
weights of qkv, o back; `attention` moves norm, qkv, attention and proj with their weights: x there, y
back, two messages a layer, and the serial block is the MLP alone. The paper does not have the last.

Micro-batches whose attention costs differ, since their documents do: `balance="work"` says which of them are a
group, and which of a group have one offset. Every offset's attention is on every rank in turn, so all ranks have the
same to do whatever its place is. But a group waits for its dearest offset, so those of like cost are a group, the
dearest first; and in a group the folds of one offset come to about the same. The paper does not have it either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from helixpipe.errors import ConfigError
from helixpipe.parts.part import AROUND_ATTENTION, Part, chain
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage, cut

GROUPS = ("sequential", "forward_first")
BALANCES = ("number", "work")


def helix(
    ranks: int,
    layers: int,
    microbatches: int,
    folds: int = 2,
    travel: str = "none",
    groups: str = "sequential",
    balance: str = "number",
    work: tuple[float, ...] = (),
) -> Schedule:
    """Stage 2l is serial block l, on rank l mod p; stage 2l+1 travels with the attention of layer l.

    `groups="sequential"` finishes a group, backward and all, before the next: memory of one group, a
    bubble for each. `groups="forward_first"` runs every group's forward, then every backward, last group
    first: one bubble, memory of all groups. Any `microbatches` and `layers`; the last group may be short.

    `balance="number"` takes micro-batches as they are numbered, `"work"` by what their attention costs, `work`, in any
    unit; without it all cost the same.
    """
    if travel not in AROUND_ATTENTION:
        raise ConfigError(f"schedule.travel: '{travel}' is not known; known: {', '.join(AROUND_ATTENTION)}")
    if groups not in GROUPS:
        raise ConfigError(f"schedule.groups: '{groups}' is not known; known: {', '.join(GROUPS)}")
    if folds < 1:
        raise ConfigError(f"schedule.folds: {folds}; give at least 1 (1 is the naive order, 2 the two-fold)")
    if balance not in BALANCES:
        raise ConfigError(f"schedule.balance: '{balance}' is not known; known: {', '.join(BALANCES)}")
    if balance == "number" and work:
        raise ConfigError("schedule.work: costs of micro-batches, and schedule.balance is number; make it work")
    if work and (len(work) != microbatches or not all(0 <= each < math.inf for each in work)):
        raise ConfigError(
            f"schedule.work: {len(work)} costs of {microbatches} micro-batches; give each one's, none below 0"
        )
    size = folds * ranks
    costs = work or (0.0,) * microbatches
    dearest = sorted(range(microbatches), key=lambda mb: -costs[mb])
    batches = [_offsets(dearest[first : first + size], ranks, costs) for first in range(0, microbatches, size)]
    runs = [batches] if groups == "forward_first" else [[batch] for batch in batches]
    orders = []
    for rank in range(ranks):
        order: list[Action] = []
        for run in runs:
            forward = [Action(stage, Pass.F, mb) for stage, mb in _forward(rank, ranks, layers, run)]
            order += forward + [action.sibling(Pass.B) for action in reversed(forward)]
        orders.append(tuple(order))
    return Schedule(_stages(ranks, layers, travel), tuple(orders))


def _offsets(group: Sequence[int], ranks: int, costs: Sequence[float]) -> list[int]:
    """A group, dearest first, by place: place i is offset i mod p. Each goes to the offset that has the least so far."""
    room = [len(range(offset, len(group), ranks)) for offset in range(min(ranks, len(group)))]
    found: list[list[int]] = [[] for _ in room]
    sums = [0.0] * len(room)
    for mb in group:
        offset = min((o for o, free in enumerate(room) if len(found[o]) < free), key=lambda o: (sums[o], len(found[o])))
        found[offset].append(mb)
        sums[offset] += costs[mb]
    # cheap ones first, where a group begins; an offset of fewer folds is behind the others
    by_sum = sorted(range(len(room)), key=lambda o: (-room[o], sums[o]))
    offsets = [sorted(found[o], key=costs.__getitem__) for o in by_sum]
    return [offsets[place % ranks][place // ranks] for place in range(len(group))]


def _stages(ranks: int, layers: int, travel: str) -> tuple[Stage, ...]:
    opens = [Part(kind, layer) for layer in range(layers) for kind in AROUND_ATTENTION[travel]]
    pieces = cut(chain(layers), opens)
    # a travelling stage with weights is at home where the block before it is
    return tuple(
        Stage(parts, home=(s // 2) % ranks if s % 2 and travel != "none" else None) for s, parts in enumerate(pieces)
    )


def _forward(rank: int, ranks: int, layers: int, groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(stage, micro-batch) of one rank's forwards of some groups, one flowing into the next.

    All attention of one diagonal l+d is on one rank, the one of block l+d+1; it ends with offset 0, whose
    block follows. So a rank walks its diagonals: attention from the oldest layer down to offset 0, then
    the block for every offset as it arrives. The next group continues the count of layers, rounded up to
    the ranks, as if its first layer stood on the last group's last: its block 0 follows block L.
    """
    stride = -(-layers // ranks) * ranks

    def slot(group: Sequence[int], stage: int, offset: int) -> Iterator[tuple[int, int]]:
        for mb in group[offset::ranks]:  # every fold of this offset
            yield stage, mb

    for diagonal in range(rank - 1, len(groups) * stride + ranks, ranks):
        for offset in range(ranks - 1, -1, -1):
            g, layer = divmod(diagonal - offset, stride)
            if 0 <= g < len(groups) and layer < layers:
                yield from slot(groups[g], 2 * layer + 1, offset)
        g, block = divmod(diagonal + 1, stride)
        for offset in range(ranks):
            if block == 0 and stride == layers and 0 < g <= len(groups):
                yield from slot(groups[g - 1], 2 * layers, offset)
            if block <= layers and g < len(groups):
                yield from slot(groups[g], 2 * block, offset)
