"""Attention as a part: q [b, s, heads, d], k and v [b, s, kv_heads, d] -> o [b, s, heads * d].

It can be replayed: given the output and log-sum-exp of an earlier run it makes the same graph without
running the kernel, which is what recomputation without attention needs (HelixPipe, section 4.4).

It can run segment by segment (Seq1F1B, section 3.2). The keys and values of earlier segments are state,
held per layer and micro-batch outside of any module so that a recompute cannot change them:

    segment 2   q2 . [k0 k1]   prefix, no mask        merged by log-sum-exp; the backward of each takes the
                q2 . k2        diagonal, causal       merged output and log-sum-exp

The backward goes from the last segment to the first; what a segment owes to earlier keys and values waits,
in float32 or wider, until theirs comes.

With a window, and where sequences hold several documents, a segment keeps only the last keys and values of its own that
later ones see, and attends to those of earlier segments that it sees: the rest is not computed, not joined, not moved, and
is owed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.model.function import Function, Holder, Saver, save, saved
from helixpipe.model.kernels import Kernel, Scores
from helixpipe.model.merging import ALL, Merged, Share, Total, attend_tiles, differentiate_tiles, heads
from helixpipe.model.packed import Packed, packed_seen, packed_tail, packed_tiles
from helixpipe.model.tiles import Run, Tile, tiles
from helixpipe.parts.attn import heads_at_once
from helixpipe.parts.window import seen, tail
from helixpipe.parts.work import Batch


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, and what becomes of its scores. Raises ConfigError for a number that makes no sense."""

    causal: bool = True
    window: int = 0
    """A token at i sees j where |i - j| < window; 0 is all."""
    softcap: float = 0.0
    """c of c * tanh(score / c); 0 is none."""
    scale: float = 0.0
    """What q.k is multiplied by; 0 is head_dim ** -0.5."""
    kernel: Kernel = "flash"
    """CUDA's, in half precision."""

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ConfigError(f"attention window: {self.window}; give how many tokens see each other, 0 is all")
        for name, of_none in (("softcap", "none"), ("scale", "head_dim ** -0.5")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"attention {name}: {getattr(self, name)}; give a number from 0 up, 0 is {of_none}")

    @property
    def scores(self) -> Scores:
        return Scores(self.softcap, self.scale, self.kernel)

    def tiles(self, queries: int, keys: int, before: int = 0) -> Sequence[Tile]:
        """Of so many queries, and keys that begin `before` tokens earlier; with a `before` all are earlier than the queries."""
        if not self.window:
            return (Tile(0, queries, 0, keys, self.causal and not before),)
        return _banded(queries, keys, before, self.causal, self.window)


@lru_cache(maxsize=256)
def _banded(queries: int, keys: int, before: int, causal: bool, window: int) -> list[Tile]:
    return tiles((Run(before, 1, queries),), (Run(0, 1, keys),), causal, window=window)


@dataclass
class KeptAttention:
    """What the backward of attention needs beside q, k and v. Empty until a forward fills it."""

    out: Tensor | None = None
    """[b, heads, s, d], in memory [b, s, heads, d]"""
    lse: Tensor | None = None
    """[b, heads, s], float32 or wider"""


class Block(NamedTuple):
    """Keys and values of earlier segments that lie side by side, [b, tokens, kv_heads, d]."""

    segments: range
    keys: Tensor
    values: Tensor


@dataclass
class KeyValues:
    """Keys and values of one layer's earlier segments of one micro-batch, and the gradients they are owed."""

    keep: Callable[[Tensor], Holder]
    keys: dict[int, Holder] = field(default_factory=dict)
    values: dict[int, Holder] = field(default_factory=dict)
    owed: dict[int, tuple[Holder, Holder]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each segment so far, on all ranks together."""
    tails: list[int] = field(default_factory=list)
    """How many of those that are here later segments see: the last ones."""
    batch: Batch | None = None
    """The micro-batch, whole, where its sequences hold several documents; None: each is one."""

    def add(self, segment: int, k: Tensor, v: Tensor, tail: int | None = None, length: int | None = None) -> None:
        """A segment's keys and values, by its first forward; a recompute finds them there.

        `tail`: how many of them, at the end, later segments see; None is all. `length`: the segment's, where other ranks
        have tokens of it too.
        """
        if segment in self.keys:
            return
        here = k.shape[1]
        tail = here if tail is None else tail
        self.lengths.append(here if length is None else length)
        self.tails.append(tail)
        if tail < here and not k.requires_grad:  # no graph holds all of them
            k, v = (t[:, here - tail :].clone() for t in (k, v))
        self.keys[segment], self.values[segment] = self.keep(k), self.keep(v)

    def start(self, segment: int) -> int:
        """A segment's first position in the sequence."""
        return sum(self.lengths[:segment])

    def seen(self, segment: int, window: int = 0) -> range:
        """Earlier segments of which it sees some key."""
        return seen(self.lengths, segment, window) if self.batch is None else packed_seen(self.batch, segment, window)

    def prefix(self, segments: range) -> tuple[Tensor, Tensor]:
        """[b, tokens, kv_heads, d] of what later segments see of these."""
        pieces = [self._tail(s) for s in segments]
        return torch.cat([k for k, _ in pieces], 1), torch.cat([v for _, v in pieces], 1)

    def blocks(self, segment: int, window: int = 0) -> list[Block]:
        """What a segment sees of earlier ones in as many pieces as suit the device.

        A CPU core pays for copies and has every piece from its own cache: one piece a segment, none copied. An
        accelerator pays for launches: one piece.
        """
        segments = self.seen(segment, window)
        if segments and self.keys[segments[0]].tensor.device.type != "cpu":
            return [Block(segments, *self.prefix(segments))]
        return [Block(range(s, s + 1), *self._tail(s)) for s in segments]

    def before(self, segment: int, block: Block) -> int:
        """How many tokens before a segment a block begins."""
        return self.start(segment) - self.start(block.segments.stop) + block.keys.shape[1]

    def owe(self, segments: range, dk: Tensor, dv: Tensor) -> None:
        """Gradients of what later segments see of these segments' keys and values, [b, tokens, kv_heads, d], from one of them."""
        tails = [self.tails[s] for s in segments]
        for s, gk, gv in zip(segments, dk.split(tails, 1), dv.split(tails, 1), strict=True):
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
        owed = [held.tensor for held in self.owed.pop(segment)]
        return _sum(owed[0], dk), _sum(owed[1], dv)

    def forget(self, segment: int, window: int) -> None:
        """Nothing is differentiated: let go of what no segment after this one sees."""
        for unseen in self.keys.keys() - set(self.seen(segment + 1, window)):
            del self.keys[unseen], self.values[unseen]

    def _tail(self, segment: int) -> tuple[Tensor, Tensor]:
        k, v = self.keys[segment].tensor, self.values[segment].tensor
        first = k.shape[1] - self.tails[segment]
        return (k[:, first:], v[:, first:]) if first else (k, v)


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
    batch: Batch | None = None
    """The micro-batch, whole, where its sequences hold several documents; None: each is one."""
    saver: Saver | None = None

    @property
    def packed(self) -> Packed | None:
        return None if self.batch is None else Packed.of(self.batch, self.segment)

    def tail(self, tokens: int, window: int) -> int:
        """How many of the segment's tokens, at its end, later segments see; `tokens`: all that it has, on all ranks."""
        return tail(tokens, window) if self.batch is None else packed_tail(self.batch, self.segment, window)


class _Attention(Function):
    """On [b, s, heads, d]. `state` carries what is no gradient's business."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: AttentionState) -> Tensor:
        kept, past, packed = state.kept, state.key_values, state.packed
        if past is not None:
            past.add(state.segment, k, v, state.tail(k.shape[1], rule.window))
        if kept is not None and kept.out is not None and kept.lse is not None:
            out, lse = kept.out, kept.lse
        else:
            merged = Merged(heads(q))
            _attend(merged, q, k, v, rule, packed, 0)
            if past is not None:
                for block in past.blocks(state.segment, rule.window):
                    _attend(merged, q, block.keys, block.values, rule, packed, past.before(state.segment, block))
            out, lse = merged.result()
            if kept is not None:
                kept.out, kept.lse = out, lse
        save(ctx, state.saver, q, k, v, out, lse)
        ctx.rule, ctx.state = rule, state
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _held, (q, k, v, out, lse) = saved(ctx)
        rule, past, segment, packed = ctx.rule, ctx.state.key_values, ctx.state.segment, ctx.state.packed
        grad = heads(grad.unflatten(2, (q.shape[2], q.shape[3])))
        if ctx.state.in_place and past is None and (at_once := _at_once(k)) < k.shape[2]:
            for first in range(0, k.shape[2], at_once):
                few = slice(first, min(first + at_once, k.shape[2]))
                _backward_in_place(few, grad, q, k, v, out, lse, rule, packed)
            return q, k, v, None, None
        dq = Total(heads(q))
        dk, dv = _differentiate(dq, grad, q, k, v, out, lse, rule, packed, 0)
        if past is not None:
            for block in past.blocks(segment, rule.window):
                before = past.before(segment, block)
                owed = _differentiate(dq, grad, q, block.keys, block.values, out, lse, rule, packed, before)
                past.owe(block.segments, *owed)
                del owed
            dk, dv = past.settle(segment, dk, dv)
        return heads(dq.result()).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _at_once(k: Tensor) -> int:
    batch, tokens, kv_heads, _ = k.shape
    return heads_at_once(k.device.type, batch, tokens, kv_heads, torch.get_num_threads())


def _backward_in_place(
    few: slice, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule,
    packed: Packed | None,
) -> None:  # fmt: skip
    """Write the gradients of some key heads, and of their queries, where these were; q, k and v [b, s, heads, d]."""
    group = q.shape[2] // k.shape[2]
    queries = slice(few.start * group, few.stop * group)
    theirs = q[:, :, queries], k[:, :, few], v[:, :, few]
    dq = Total(heads(theirs[0]))
    dk, dv = _differentiate(dq, grad[:, queries], *theirs, out[:, queries], lse[:, queries], rule, packed, 0)
    for tensor, gradient in zip(theirs, (heads(dq.result()), dk, dv), strict=True):
        tensor.copy_(gradient)


def _shares(rule: Rule, packed: Packed | None, queries: int, keys: int, before: int) -> Sequence[Share]:
    """The tiles of so many queries and keys, as `Rule.tiles`, and the sequences of the batch that each is of."""
    if packed is None:
        return [(ALL, tile) for tile in rule.tiles(queries, keys, before)]
    return packed_tiles(packed, Run(0, 1, queries), Run(-before, 1, keys), rule.causal, rule.window)


def _attend(merged: Merged, q: Tensor, k: Tensor, v: Tensor, rule: Rule, packed: Packed | None, before: int) -> None:
    """Of q to keys that begin `before` tokens earlier, [b, tokens, heads, d]."""
    shares = _shares(rule, packed, q.shape[1], k.shape[1], before)
    attend_tiles(merged, heads(q), heads(k), heads(v), shares, rule.scores)


def _differentiate(
    dq: Total, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule,
    packed: Packed | None, before: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, [b, tokens, kv_heads, d]; `dq` gets its share."""
    q, k, v = heads(q), heads(k), heads(v)
    dk, dv = Total(k), Total(v)
    shares = _shares(rule, packed, q.shape[2], k.shape[2], before)
    differentiate_tiles(dq, dk, dv, grad, q, k, v, out, lse, shares, rule.scores)
    return heads(dk.result()), heads(dv.result())


def _sum(owed: Tensor, gradient: Tensor) -> Tensor:
    """A segment's own gradient and what its last tokens are owed, which may be overwritten."""
    if owed.shape == gradient.shape:
        return owed.add_(gradient).to(gradient.dtype)
    wide = gradient.to(owed.dtype)
    wide[:, wide.shape[1] - owed.shape[1] :].add_(owed)
    return wide.to(gradient.dtype)


def _wide_alone(gradient: Tensor) -> Tensor:
    """In float32 or wider, and no slice, which would keep all of its tensor alive."""
    is_slice = gradient.untyped_storage().nbytes() > gradient.nbytes
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=is_slice)


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: AttentionState) -> Tensor:
    """o, [b, s, heads * d], from all keys and values here."""
    return _Attention.apply(q, k, v, rule, state)  # type: ignore[no-any-return]
