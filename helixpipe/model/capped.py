"""Attention whose scores are capped, c * tanh(score / c) (Gemma 2), block by block: no fused kernel of torch caps them.

Of scores no more is there at a time than of `ROWS` queries against `COLUMNS` keys, so memory is linear in the sequence. The
forward merges blocks by log-sum-exp as it goes; the backward computes the scores again. All in float32 or wider, with the
query heads that share a key head as rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS, COLUMNS = 256, 1024


def capped_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """out like q and its log-sum-exp, of q [b, heads, s, d] and k, v [b, kv_heads, s', d]; `causal` from the top left."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for rows in _blocks(q.shape[2], ROWS):
        mine = _joined(q[:, :, rows], k, wide)
        total = mine.new_full(mine.shape[:-1], float("-inf"))
        mixed = torch.zeros_like(mine)
        for keys in _seen(rows, k.shape[2], causal):
            scores = _capped(mine, k[:, :, keys].to(wide), softcap, scale).mul_(softcap)
            _hide(scores, rows, keys, causal)
            both = torch.logaddexp(total, scores.logsumexp(-1))
            mixed.mul_((total - both).exp_().unsqueeze(-1))
            mixed += scores.sub_(both.unsqueeze(-1)).exp_() @ v[:, :, keys].to(wide)
            total = both
        out[:, :, rows] = _apart(mixed, q)
        lse[:, :, rows] = _apart(total.unsqueeze(-1), q).squeeze(-1)
    return out, lse


def capped_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, softcap: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` may be of more keys than are here."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    dk, dv = (t.new_zeros(_swapped(t), dtype=wide).transpose(1, 2) for t in (k, v))
    for rows in _blocks(q.shape[2], ROWS):
        mine, given, made = (_joined(t[:, :, rows], k, wide) for t in (q, grad, out))
        total = _joined(lse[:, :, rows].unsqueeze(-1), k, wide)
        shared = (given * made).sum(-1, keepdim=True)
        dmine = torch.zeros_like(mine)
        for keys in _seen(rows, k.shape[2], causal):
            theirs, values = k[:, :, keys].to(wide), v[:, :, keys].to(wide)
            capped = _capped(mine, theirs, softcap, scale)
            weights = capped * softcap
            _hide(weights, rows, keys, causal)
            weights.sub_(total).exp_()
            dv[:, :, keys] += weights.mT @ given
            dscores = (given @ values.mT).sub_(shared).mul_(weights)
            dscores.mul_(capped.square_().neg_().add_(1.0)).mul_(scale)  # tanh' = 1 - tanh²
            dmine += dscores @ theirs
            dk[:, :, keys] += dscores.mT @ mine
        dq[:, :, rows] = _apart(dmine, q)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _seen(rows: slice, keys: int, causal: bool) -> Iterator[slice]:
    """Blocks of the keys that some of these queries see."""
    return _blocks(min(keys, rows.stop) if causal else keys, COLUMNS)


def _capped(q: Tensor, k: Tensor, softcap: float, scale: float) -> Tensor:
    """tanh(score / c)"""
    return (q @ k.mT).mul_(scale / softcap).tanh_()


def _hide(scores: Tensor, rows: slice, keys: slice, causal: bool) -> None:
    """Later keys weigh nothing. [b, kv_heads, heads / kv_heads * rows, keys]"""
    if causal and keys.stop > rows.start + 1:
        positions = torch.arange(rows.start, rows.stop, device=scores.device).unsqueeze(1)
        later = torch.arange(keys.start, keys.stop, device=scores.device) > positions
        scores.unflatten(2, (-1, rows.stop - rows.start)).masked_fill_(later, float("-inf"))


def _joined(t: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, heads, n, d] -> [b, kv_heads, heads / kv_heads * n, d]"""
    joined: Tensor = t.unflatten(1, (k.shape[1], -1)).flatten(2, 3).to(dtype)
    return joined


def _apart(t: Tensor, q: Tensor) -> Tensor:
    """[b, kv_heads, heads / kv_heads * n, d] -> [b, heads, n, d]"""
    apart: Tensor = t.unflatten(2, (q.shape[1] // t.shape[1], -1)).flatten(1, 2)
    return apart


def _swapped(t: Tensor) -> tuple[int, int, int, int]:
    b, heads, length, d = t.shape
    return b, length, heads, d
