"""Attention as a part: q [b, s, heads, d], k and v [b, s, kv_heads, d] -> o [b, s, heads * d].

It can be replayed: given the output and log-sum-exp of an earlier run it makes the same graph without
running the kernel, which is what recomputation without attention needs (HelixPipe, section 4.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from helixpipe.model.kernels import attention_backward, attention_forward


@dataclass
class KeptAttention:
    """What the backward of attention needs beside q, k and v. Empty until a forward fills it."""

    out: Tensor | None = None
    """[b, heads, s, d], in memory [b, s, heads, d]"""
    lse: Tensor | None = None
    """[b, heads, s], float32 or wider"""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, kept: KeptAttention | None) -> Tensor:
        if kept is not None and kept.out is not None and kept.lse is not None:
            out, lse = kept.out, kept.lse
        else:
            out, lse = attention_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal)
            if kept is not None:
                kept.out, kept.lse = out, lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.unflatten(2, (q.shape[2], q.shape[3])).transpose(1, 2)
        grads = attention_backward(grad, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out, lse, ctx.causal)
        return *(g.transpose(1, 2) for g in grads), None, None


class Attention(nn.Module):
    """The part `attn`. Parameterless, so it can run on any rank."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: KeptAttention | None = None) -> Tensor:
        """o, [b, s, heads * d]. A filled `kept` is replayed, an empty one is filled."""
        return _Attention.apply(q, k, v, self.causal, kept)  # type: ignore[no-any-return,no-untyped-call]
