"""Attention over keys and values that travel: the forward and backward of all methods here.

One ring of three; `01` is rank 0's block being attended by rank 1, and blocks move one rank down a step:

    step        0     1     2
    rank 0     00    20    10        forward: K,V leave for the next rank before they are attended
    rank 1     11    01    21        backward: the same again, and the block's dK,dV follow one step behind:
    rank 2     22    12    02        01, then 01+02, then home to 0, which has kept its own 00

K,V and dK,dV each take N-1 hops. A double ring is a ring whose every step is a whole inner ring; a block's
gradients come home on the inner ring first and then on the outer one. Outputs are merged by log-sum-exp and
gradients are summed in float32 or wider, so the error does not grow with the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helixpipe.model.attention import KeptAttention, merge, narrow
from helixpipe.model.kernels import attention_backward, attention_forward
from helixpipe.sequence.tiles import Tile
from helixpipe.sequence.wire import Passing, Peers

Index = tuple[slice, slice, slice]
"""batch, heads, tokens"""
ALL = slice(None)

KEYS, GRADIENTS = 0, 2  # tags


@dataclass(frozen=True)
class Plan:
    """What one call does on this rank. Holds no tensors."""

    rings: tuple[Peers, ...]
    """From the outer to the inner; none: the keys and values here are all there are."""
    tiles: Callable[[tuple[int, ...]], list[tuple[slice, Tile]]]
    """The tiles of the block that is here after so many steps of each ring, with the sequences of the batch."""


class Spread(torch.autograd.Function):
    """q [b, s, heads, d] against k, v [b, s_keys, kv_heads, d] of this and the other ranks; out like q.

    With `kept` filled nothing is attended or sent, and the same graph is made; with it empty it is filled.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, kept: KeptAttention | None) -> Tensor:
        if kept is not None and kept.out is not None and kept.lse is not None:
            out, lse = kept.out, kept.lse
        else:
            out, lse = _forward(_heads(q), k, v, plan)
            if kept is not None:
                kept.out, kept.lse = out, lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return _heads(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _Backward(ctx.plan, _heads(grad), _heads(q), out, lse).run(k, v)
        return _heads(dq).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    merged = _Merged(q)
    _visit(plan, q, merged, plan.rings, (), (k, v))
    return merged.result()


def _visit(
    plan: Plan, q: Tensor, merged: _Merged, rings: Sequence[Peers], steps: tuple[int, ...], block: Sequence[Tensor]
) -> None:
    """Attend to the block that is here, and to those that come around these rings."""
    if not rings:
        k, v = map(_heads, block)
        for batch, tile in plan.tiles(steps):
            rows, keys = (batch, ALL, tile.queries), (batch, ALL, tile.keys)
            merged.add(rows, *attention_forward(q[rows], k[keys], v[keys], tile.causal))
        return
    ring, *inner = rings
    for step in range(ring.size):
        coming = ring.pass_on(block, "keys and values", KEYS) if step + 1 < ring.size else None
        _visit(plan, q, merged, inner, (*steps, step), block)
        if coming is not None:
            block = coming.wait()


class _Backward:
    """One backward: dq collects here, every block's dk and dv travel home."""

    def __init__(self, plan: Plan, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        self.plan, self.grad, self.q, self.out, self.lse = plan, grad, q, out, lse
        self.dq = _Total(q)

    def run(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq [b, heads, s, d]; dk and dv [b, s_keys, kv_heads, d]; in float32 or wider."""
        dk, dv = self._visit(self.plan.rings, (), (k, v))
        return self.dq.result(), dk, dv

    def _visit(self, rings: Sequence[Peers], steps: tuple[int, ...], block: Sequence[Tensor]) -> list[Tensor]:
        """dk and dv of the block, from all ranks of these rings, on the rank where the block was first."""
        if not rings:
            return self._differentiate(steps, *map(_heads, block))
        ring, *inner = rings
        own: list[Tensor] = []
        riding: Passing | None = None
        for step in range(ring.size):
            coming = ring.pass_on(block, "keys and values", KEYS) if step + 1 < ring.size else None
            mine = self._visit(inner, (*steps, step), block)
            if step == 0:
                own = mine
            else:
                _add(mine, riding)
                riding = ring.pass_on(mine, "gradients of keys and values", GRADIENTS)
            if coming is not None:
                block = coming.wait()
        _add(own, riding)
        return own

    def _differentiate(self, steps: tuple[int, ...], k: Tensor, v: Tensor) -> list[Tensor]:
        dk, dv = _Total(k), _Total(v)
        for batch, tile in self.plan.tiles(steps):
            rows, keys = (batch, ALL, tile.queries), (batch, ALL, tile.keys)
            dq_tile, dk_tile, dv_tile = attention_backward(
                self.grad[rows], self.q[rows], k[keys], v[keys], self.out[rows], self.lse[rows], tile.causal
            )
            self.dq.add(rows, dq_tile)
            dk.add(keys, dk_tile)
            dv.add(keys, dv_tile)
        return [_heads(dk.result()), _heads(dv.result())]


class _Merged:
    """Attention over the tiles so far, in float32 or wider: (out, lse), [b, heads, s, d] and [b, heads, s]."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._wide = torch.promote_types(q.dtype, torch.float32)
        self._out: Tensor | None = None
        self._lse = q.new_empty(0)

    def add(self, rows: Index, out: Tensor, lse: Tensor) -> None:
        if self._out is None:
            if out.shape == self._q.shape:
                self._out, self._lse = out.to(self._wide), lse.contiguous()
                return
            self._out = _zeros(self._q, self._wide)
            self._lse = torch.full(self._q.shape[:3], float("-inf"), dtype=lse.dtype, device=lse.device)
        _, self._lse[rows] = merge(self._out[rows], self._lse[rows], out, lse)  # into `_out`, which is wide

    def result(self) -> tuple[Tensor, Tensor]:
        assert self._out is not None, "every token attends to itself"
        return narrow(self._out, self._q.dtype), self._lse


class _Total:
    """A sum of gradients of slices of a tensor [b, heads, s, d], in float32 or wider."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._wide = like, torch.promote_types(like.dtype, torch.float32)
        self._sum: Tensor | None = None

    def add(self, index: Index, gradient: Tensor) -> None:
        if self._sum is None:
            if gradient.shape == self._like.shape:
                self._sum = gradient.to(self._wide)
                return
            self._sum = _zeros(self._like, self._wide)
        self._sum[index] += gradient

    def result(self) -> Tensor:
        return self._sum if self._sum is not None else _zeros(self._like, self._wide)


def _add(mine: Sequence[Tensor], riding: Passing | None) -> None:
    if riding is not None:
        for ours, theirs in zip(mine, riding.wait(), strict=True):
            ours.add_(theirs)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, heads, s, d], in memory [b, s, heads, d]"""
    return _heads(torch.zeros(_heads(like).shape, dtype=dtype, device=like.device))


def _heads(t: Tensor) -> Tensor:
    """[b, s, heads, d] <-> [b, heads, s, d]"""
    return t.transpose(1, 2)
