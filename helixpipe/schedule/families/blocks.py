"""Repeated blocks (arXiv 2405.15362): V schedules whose memory is decided by one micro-batch's block.

A block is when each rank runs F and I of one micro-batch, in units of one F = I = W. A rank has six passes a
micro-batch, F, I and W of two chunks, so the block repeats every 6 units; where four of them fall on different
units modulo 6, nothing collides, W's have the other two, and as many activations are kept as live in one block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.v_shape import stage_of

PERIOD = 6


class Block(NamedTuple):
    """When one rank runs the passes of micro-batch 0; F0 is the forward of its chunk 0."""

    F0: int
    F1: int
    I1: int
    I0: int

    def offset(self, kind: Pass, chunk: int) -> int:
        return ((self.F0, self.F1) if kind is Pass.F else (self.I0, self.I1))[chunk]

    def kept(self, chunk: int) -> int:
        """Forwards of the chunk that are kept at most, each until the unit after its I."""
        return -((self.offset(Pass.F, chunk) - self.offset(Pass.I, chunk) - 1) // PERIOD)


def repeat(blocks: Sequence[Block], microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Each rank's order when the block is repeated for every micro-batch, W's in the holes."""
    return tuple(_repeat(rank, block, len(blocks), microbatches) for rank, block in enumerate(blocks))


def _repeat(rank: int, block: Block, ranks: int, microbatches: int) -> tuple[Action, ...]:
    slots = {}
    for kind in (Pass.F, Pass.I):
        for chunk in (0, 1):
            for mb in range(microbatches):
                action = Action(stage_of(rank, chunk, ranks), kind, mb)
                slots[block.offset(kind, chunk) + PERIOD * mb] = action
    order: list[Action] = []
    waiting: deque[Action] = deque()
    for slot in range(max(slots) + 1):
        if slot in slots:
            order.append(slots[slot])
            waiting += [slots[slot].sibling(Pass.W)] if slots[slot].kind is Pass.I else []
        elif waiting:
            order.append(waiting.popleft())
    return (*order, *waiting)
