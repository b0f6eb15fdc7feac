"""Attention put together from tiles: outputs merged by log-sum-exp, gradients of slices summed.

Tensors are [b, heads, s, d]. What comes first and is whole stays as the kernel gave it, so that one tile costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from helixpipe.model.joint import Rows, joint
from helixpipe.model.kernels import (
    Scores,
    attention_backward,
    attention_forward,
    fused_jointly,
    joint_backward,
    joint_forward,
)
from helixpipe.model.tiles import Tile

Index = tuple[slice, slice, slice] | Rows
"""batch, heads, tokens; or rows of a joint call, [n, heads, ...]"""
Share = tuple[slice, Tile]
"""A tile, and the sequences of the batch that it is of."""
ALL = slice(None)


def attend_tiles(merged: Merged, q: Tensor, k: Tensor, v: Tensor, shares: Sequence[Share], scores: Scores) -> None:
    """Attention of tiles, each of some sequences of the batch, into `merged`."""
    if _jointly(q, shares, scores):
        for call in joint(shares, len(q), q.device):
            merged.add(call.queries, *joint_forward(q[call.queries], k[call.keys], v[call.keys], call, scores.scale))
        return
    for batch, tile in shares:
        merged.add((batch, ALL, tile.queries), *_tile_forward(q, k, v, batch, tile, scores))


def differentiate_tiles(
    dq: Total, dk: Total, dv: Total, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    shares: Sequence[Share], scores: Scores,
) -> None:  # fmt: skip
    """Gradients of tiles, each of some sequences of the batch, into their totals."""
    if _jointly(q, shares, scores):
        for call in joint(shares, len(q), q.device):
            mine, theirs = call.queries, call.keys
            found = joint_backward(grad[mine], q[mine], k[theirs], v[theirs], out[mine], lse[mine], call, scores.scale)
            _add(((dq, mine), (dk, theirs), (dv, theirs)), found)
            del found
        return
    for batch, tile in shares:
        queries, keys = (batch, ALL, tile.queries), (batch, ALL, tile.keys)
        found = _tile_backward(grad, q, k, v, out, lse, batch, tile, scores)
        _add(((dq, queries), (dk, keys), (dv, keys)), found)
        del found


def _add(totals: Iterable[tuple[Total, Index]], gradients: Iterable[Tensor]) -> None:
    for (total, index), gradient in zip(totals, gradients, strict=True):
        total.add(index, gradient)


def _jointly(q: Tensor, shares: Sequence[Share], scores: Scores) -> bool:
    """Whether tiles of their own would only be more launches."""
    return len(shares) > 1 and scores.kernel != "efficient" and fused_jointly(q, scores.softcap)


def _tile_forward(q: Tensor, k: Tensor, v: Tensor, batch: slice, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp of a tile's queries against its keys."""
    q, k, v = q[batch, :, tile.queries], k[batch, :, tile.keys], v[batch, :, tile.keys]
    if not tile.flipped:
        return attention_forward(q, k, v, tile.causal, *scores)
    out, lse = attention_forward(q.flip(2), k.flip(2), v.flip(2), True, *scores)
    return out.flip(2), lse.flip(2)


def _tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, batch: slice, tile: Tile,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a tile's queries, keys and values."""
    grad, q, out, lse = (t[batch, :, tile.queries] for t in (grad, q, out, lse))
    k, v = (t[batch, :, tile.keys] for t in (k, v))
    if not tile.flipped:
        return attention_backward(grad, q, k, v, out, lse, tile.causal, *scores)
    grad, q, k, v, out, lse = (t.flip(2) for t in (grad, q, k, v, out, lse))
    dq, dk, dv = attention_backward(grad, q, k, v, out, lse, True, *scores)
    return dq.flip(2), dk.flip(2), dv.flip(2)


class Merged:
    """Attention over the tiles so far: (out, lse), [b, heads, s, d] and [b, heads, s]."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._wide = torch.promote_types(q.dtype, torch.float32)
        self._out: Tensor | None = None
        self._lse = q.new_empty(0)

    def add(self, rows: Index, out: Tensor, lse: Tensor) -> None:
        """Attention of some rows to keys that they have not met yet."""
        if self._out is None:
            if out.shape == self._q.shape:
                self._out, self._lse = out, lse
                return
            self._out = zeros(self._q, self._wide)
            self._lse = torch.full(self._q.shape[:3], float("-inf"), dtype=lse.dtype, device=lse.device)
        if out.shape == self._q.shape:
            self._out, self._lse = merge(self._out, self._lse, out, lse)
            return
        self._out, self._lse = self._out.to(self._wide), self._lse.contiguous()
        merged, self._lse[rows] = merge(self._out[rows], self._lse[rows], out, lse)
        if isinstance(rows[0], Tensor):  # slices are merged in place, rows are copies
            self._out[rows] = merged

    def result(self) -> tuple[Tensor, Tensor]:
        assert self._out is not None, "every token attends to itself"
        return narrow(self._out, self._q.dtype), self._lse


class Total:
    """A sum of gradients of slices of a tensor, in float32 or wider but for one that is alone."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._wide = like, torch.promote_types(like.dtype, torch.float32)
        self._sum: Tensor | None = None

    def add(self, index: Index, gradient: Tensor) -> None:
        if self._sum is None:
            if gradient.shape == self._like.shape:
                self._sum = gradient
                return
            self._sum = zeros(self._like, self._wide)
        self._sum = self._sum.to(self._wide)
        if isinstance(index[0], Tensor):  # rows once each, of which an index gives copies
            self._sum[index] = self._sum[index] + gradient
        else:
            self._sum[index].add_(gradient)

    def result(self) -> Tensor:
        return self._sum if self._sum is not None else zeros(self._like, self._wide)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: (out, lse), in float32 or wider.

    `out` may be overwritten: out + sigmoid(lse' - lse)(out' - out), and log(exp lse + exp lse').
    """
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    share = torch.sigmoid(other_lse - lse)
    wide.lerp_(other.to(wide.dtype), share.unsqueeze(-1).to(wide.dtype))
    return wide, torch.logaddexp(lse, other_lse)


def narrow(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A merged output in the run's precision and, as the kernels give it, in memory [b, s, heads, d]."""
    return heads(heads(out).to(dtype).contiguous())


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, heads, s, d], in memory [b, s, heads, d]"""
    return heads(torch.zeros(heads(like).shape, dtype=dtype, device=like.device))


def heads(t: Tensor) -> Tensor:
    """[b, s, heads, d] <-> [b, heads, s, d]"""
    return t.transpose(1, 2)
