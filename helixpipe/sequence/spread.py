"""Attention over keys and values that travel: the forward and backward of all methods here.

One ring of three; `01` is rank 0's block being attended by rank 1, and blocks move one rank down a step:

    step        0     1     2
    rank 0     00    20    10        forward: K,V leave for the next rank before they are attended
    rank 1     11    01    21        backward: the same again, and the block's dK,dV follow one step behind:
    rank 2     22    12    02        01, then 01+02, then home to 0, which has kept its own 00

K,V and dK,dV each take N-1 hops. A double ring is a ring whose every step is a whole inner ring; a block's
gradients come home on the inner ring first and then on the outer one. Outputs are merged by log-sum-exp and
gradients are summed in float32 or wider, so the error does not grow with the ring.

A ring may end early: with a window, and contiguous shards, nobody needs a block beyond some step. There the hops end
too, and the gradients go home from where they are, in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helixpipe.model.attention import KeptAttention, Rule
from helixpipe.model.merging import Merged, Share, Total, attend_tiles, differentiate_tiles, heads
from helixpipe.sequence.wire import Passing, Peers

KEYS, GRADIENTS = 0, 2  # tags


@dataclass(frozen=True)
class Plan:
    """What one call does on this rank. Holds no tensors."""

    rings: tuple[Peers, ...]
    """From the outer to the inner; none: the keys and values here are all there are."""
    tiles: Callable[[tuple[int, ...]], Sequence[Share]]
    """The tiles of the block that is here after so many steps of each ring, with the sequences of the batch."""
    rule: Rule = field(default_factory=Rule)
    """What becomes of scores; `tiles` know who sees whom."""
    last: Callable[[tuple[int, ...]], int] | None = None
    """After so many steps of the outer rings, the last step of the next one at which any rank needs its block; None is
    the ring's last."""

    def steps(self, ring: Peers, before: tuple[int, ...]) -> int:
        """How many steps of a ring there are, after so many of the outer ones."""
        return ring.size if self.last is None else self.last(before) + 1


class Spread(torch.autograd.Function):
    """q [b, s, heads, d] against k, v [b, s_keys, kv_heads, d] of this and the other ranks; out like q.

    With `kept` filled nothing is attended or sent, and the same graph is made; with it empty it is filled.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, kept: KeptAttention | None) -> Tensor:
        if kept is not None and kept.out is not None and kept.lse is not None:
            out, lse = kept.out, kept.lse
        else:
            out, lse = _forward(heads(q), k, v, plan)
            if kept is not None:
                kept.out, kept.lse = out, lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return heads(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _Backward(ctx.plan, heads(grad), heads(q), out, lse).run(k, v)
        return heads(dq).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    merged = Merged(q)
    _visit(plan, q, merged, plan.rings, (), (k, v))
    return merged.result()


def _visit(
    plan: Plan, q: Tensor, merged: Merged, rings: Sequence[Peers], steps: tuple[int, ...], block: Sequence[Tensor]
) -> None:
    """Attend to the block that is here, and to those that come around these rings."""
    if not rings:
        k, v = map(heads, block)
        attend_tiles(merged, q, k, v, plan.tiles(steps), plan.rule.scores)
        return
    ring, *inner = rings
    count = plan.steps(ring, steps)
    for step in range(count):
        coming = ring.pass_on(block, "keys and values", KEYS) if step + 1 < count else None
        _visit(plan, q, merged, inner, (*steps, step), block)
        if coming is not None:
            block = coming.wait()


class _Backward:
    """One backward: dq collects here, every block's dk and dv travel home."""

    def __init__(self, plan: Plan, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        self.plan, self.grad, self.q, self.out, self.lse = plan, grad, q, out, lse
        self.dq = Total(q)

    def run(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq [b, heads, s, d]; dk and dv [b, s_keys, kv_heads, d]; in float32 or wider."""
        dk, dv = self._visit(self.plan.rings, (), (k, v))
        return self.dq.result(), dk, dv

    def _visit(self, rings: Sequence[Peers], steps: tuple[int, ...], block: Sequence[Tensor]) -> list[Tensor]:
        """dk and dv of the block, from all ranks of these rings, on the rank where the block was first."""
        if not rings:
            return self._differentiate(steps, *map(heads, block))
        ring, *inner = rings
        own: list[Tensor] = []
        riding: Passing | None = None
        count = self.plan.steps(ring, steps)
        for step in range(count):
            coming = ring.pass_on(block, "keys and values", KEYS) if step + 1 < count else None
            mine = self._visit(inner, (*steps, step), block)
            if step == 0:
                own = mine
            else:
                _add(mine, riding)
                hops = 1 if step + 1 < count else -step  # from the last step on they go home, which may be one hop more
                riding = ring.pass_on(mine, "gradients of keys and values", GRADIENTS, hops)
            if coming is not None:
                block = coming.wait()
        _add(own, riding)
        return own

    def _differentiate(self, steps: tuple[int, ...], k: Tensor, v: Tensor) -> list[Tensor]:
        dk, dv = Total(k), Total(v)
        wide = torch.promote_types(k.dtype, torch.float32)
        differentiate_tiles(
            self.dq,
            dk,
            dv,
            self.grad,
            self.q,
            k,
            v,
            self.out,
            self.lse,
            self.plan.tiles(steps),
            self.plan.rule.scores,
        )
        return [heads(total.result()).to(wide) for total in (dk, dv)]


def _add(mine: Sequence[Tensor], riding: Passing | None) -> None:
    if riding is not None:
        for ours, theirs in zip(mine, riding.wait(), strict=True):
            ours.add_(theirs)
