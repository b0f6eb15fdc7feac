"""Attention as a part: q [b, s, heads, d], k and v [b, s, kv_heads, d] -> o [b, s, heads * d].

It can be replayed: given the output and log-sum-exp of an earlier run it makes the same graph without
running the kernel, which is what recomputation without attention needs (HelixPipe, section 4.4).

It can run segment by segment (Seq1F1B, section 3.2). The keys and values of earlier segments are state,
held per layer and micro-batch outside of any module so that a recompute cannot change them:

    segment 2   q2 . [k0 k1]   prefix, no mask        merged by log-sum-exp; the backward of each takes the
                q2 . k2        diagonal, causal       merged output and log-sum-exp

The backward goes from the last segment to the first; what a segment owes to earlier keys and values waits,
in float32 or wider, until theirs comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from helixpipe.model.kernels import attention_backward, attention_forward
from helixpipe.parts.attn import heads_at_once


@dataclass
class KeptAttention:
    """What the backward of attention needs beside q, k and v. Empty until a forward fills it."""

    out: Tensor | None = None
    """[b, heads, s, d], in memory [b, s, heads, d]"""
    lse: Tensor | None = None
    """[b, heads, s], float32 or wider"""


class Holder(Protocol):
    """Something that keeps a tensor alive, and is counted for it."""

    tensor: Tensor


@dataclass
class KeyValues:
    """Keys and values of one layer's earlier segments of one micro-batch, and the gradients they are owed."""

    keep: Callable[[Tensor], Holder]
    keys: dict[int, Holder] = field(default_factory=dict)
    values: dict[int, Holder] = field(default_factory=dict)
    owed: dict[int, tuple[Holder, Holder]] = field(default_factory=dict)

    def add(self, segment: int, k: Tensor, v: Tensor) -> None:
        """A segment's keys and values, by its first forward; a recompute finds them there."""
        if segment not in self.keys:
            self.keys[segment], self.values[segment] = self.keep(k), self.keep(v)

    def length(self, segment: int) -> int:
        """Tokens of all earlier segments that are here."""
        return sum(self.keys[s].tensor.shape[1] for s in range(segment))

    def prefix(self, segment: int) -> tuple[Tensor, Tensor]:
        """[b, start, kv_heads, d] of all earlier segments."""
        k, v = ([held[s].tensor for s in range(segment)] for held in (self.keys, self.values))
        return torch.cat(k, 1), torch.cat(v, 1)

    def blocks(self, segment: int) -> list[tuple[range, Tensor, Tensor]]:
        """The prefix in as many pieces as suit the device, each with its segments.

        A CPU core pays for copies and has every piece from its own cache: one piece a segment, none copied. An
        accelerator pays for launches: one piece.
        """
        if not segment:
            return []
        if self.keys[0].tensor.device.type != "cpu":
            return [(range(segment), *self.prefix(segment))]
        return [(range(s, s + 1), self.keys[s].tensor, self.values[s].tensor) for s in range(segment)]

    def owe(self, segments: range, dk: Tensor, dv: Tensor) -> None:
        """Gradients of these segments' keys and values, [b, tokens, kv_heads, d], from a later one."""
        lengths = [self.keys[s].tensor.shape[1] for s in segments]
        for s, gk, gv in zip(segments, dk.split(lengths, 1), dv.split(lengths, 1), strict=True):
            if s in self.owed:
                self.owed[s][0].tensor.add_(gk)
                self.owed[s][1].tensor.add_(gv)
            else:
                self.owed[s] = self.keep(_wide_alone(gk)), self.keep(_wide_alone(gv))

    def settle(self, segment: int, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """A segment's own gradients and all that later segments owed it; its keys and values may go."""
        del self.keys[segment], self.values[segment]
        if segment not in self.owed:
            return dk, dv
        owed_k, owed_v = (held.tensor for held in self.owed.pop(segment))
        return owed_k.add_(dk).to(dk.dtype), owed_v.add_(dv).to(dv.dtype)


@dataclass(frozen=True)
class AttentionState:
    """What an attention part is given beside q, k and v."""

    kept: KeptAttention | None = None
    """Filled: replayed. Empty: filled."""
    key_values: KeyValues | None = None
    """None when the sequence is whole."""
    segment: int = 0
    in_place: bool = False
    """Whether nobody else reads q, k and v, now or later: their gradients may take their places."""


class _Attention(torch.autograd.Function):
    """On [b, s, heads, d]. `state` carries what is no gradient's business."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: AttentionState) -> Tensor:
        kept, past = state.kept, state.key_values
        if past is not None:
            past.add(state.segment, k, v)
        if kept is not None and kept.out is not None and kept.lse is not None:
            out, lse = kept.out, kept.lse
        else:
            out, lse = attention_forward(_heads(q), _heads(k), _heads(v), causal)
            for _, before_k, before_v in past.blocks(state.segment) if past is not None else ():
                before = attention_forward(_heads(q), _heads(before_k), _heads(before_v), False)
                out, lse = merge(out, lse, *before)
            out = narrow(out, q.dtype)
            if kept is not None:
                kept.out, kept.lse = out, lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.state = causal, state
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        past, segment = ctx.state.key_values, ctx.state.segment
        grad = _heads(grad.unflatten(2, (q.shape[2], q.shape[3])))
        if ctx.state.in_place and past is None and (at_once := _at_once(k)) < k.shape[2]:
            for first in range(0, k.shape[2], at_once):
                few = slice(first, min(first + at_once, k.shape[2]))
                _backward_in_place(few, grad, _heads(q), _heads(k), _heads(v), out, lse, ctx.causal)
            return q, k, v, None, None
        dq, dk, dv = map(_heads, attention_backward(grad, _heads(q), _heads(k), _heads(v), out, lse, ctx.causal))
        if past is not None:
            for segments, *before in past.blocks(segment):
                before_k, before_v = map(_heads, before)
                more, *owed = map(_heads, attention_backward(grad, _heads(q), before_k, before_v, out, lse, False))
                past.owe(segments, *owed)
                dq = dq.to(torch.promote_types(q.dtype, torch.float32)).add_(more)
            dk, dv = past.settle(segment, dk, dv)
        return dq.to(q.dtype), dk, dv, None, None


def _at_once(k: Tensor) -> int:
    batch, tokens, kv_heads, _ = k.shape
    return heads_at_once(k.device.type, batch, tokens, kv_heads, torch.get_num_threads())


def _backward_in_place(
    heads: slice, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> None:
    """Write the gradients of some key heads, and of their queries, where these were; all [b, heads, s, d]."""
    group = q.shape[1] // k.shape[1]
    queries = slice(heads.start * group, heads.stop * group)
    theirs = q[:, queries], k[:, heads], v[:, heads]
    made = attention_backward(grad[:, queries], *theirs, out[:, queries], lse[:, queries], causal)
    for tensor, gradient in zip(theirs, made, strict=True):
        tensor.copy_(gradient)


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
    return _heads(_heads(out).to(dtype).contiguous())


def _wide_alone(gradient: Tensor) -> Tensor:
    """In float32 or wider, and no slice, which would keep all of its tensor alive."""
    is_slice = gradient.untyped_storage().nbytes() > gradient.nbytes
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=is_slice)


def _heads(t: Tensor) -> Tensor:
    """[b, s, heads, d] <-> [b, heads, s, d]"""
    return t.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, state: AttentionState) -> Tensor:
    """o, [b, s, heads * d], from all keys and values here."""
    return _Attention.apply(q, k, v, causal, state)  # type: ignore[no-any-return,no-untyped-call]
