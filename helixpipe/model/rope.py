"""Rotary positions, and where the tokens of a call are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helixpipe.model.function import Function
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the tokens of a call are in their documents, which begin at 0 each."""

    at: Tensor
    """int64 [b, s]"""
    lengths: Tensor
    """How long the document of each token is, whole: int64 [b, s]."""

    def of(self, tokens: slice | Tensor) -> Positions:
        """Those of some tokens of the sequence."""
        return Positions(self.at[:, tokens], self.lengths[:, tokens])


Start = int | Tensor | Positions
"""The first position of contiguous tokens; where ranks share a sequence, every token's position, int64 [s]; where sequences
hold several documents, those in each."""
# tokens of rotary tables that are kept, in longest sequences: a few ways to cut one stay, ever new lengths do not
KEPT_SEQUENCES = 8


class Rope:
    """Rotary positions (arXiv 2104.09864), halves rotated as in Llama. Tables are made on demand and shared."""

    def __init__(self, dim: int, base: float, rotary: Rotary | None = None) -> None:
        """`dim`: how many numbers of each head are rotated, its first ones; the rest pass as they are."""
        self.dim, self.base, self.rotary = dim, base, rotary or Rotary()
        self.tables: dict[tuple[int | Tensor, int, torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        self._tokens = self._longest = 0
        self.turned: Turned = turned
        """What it computes; may be compiled."""

    def table(
        self, start: int | Tensor, length: int, device: torch.device, dtype: torch.dtype, sequence_length: int = 0
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, [s, 1, d/2], from angles in float64 so that far positions stay exact.

        `sequence_length`: of the whole sequence, on which some scalings depend; 0: it ends with these tokens.
        """
        if not sequence_length and self.rotary.by_length:
            sequence_length = int(start.max()) + 1 if isinstance(start, Tensor) else start + length
        # a tensor is a key by its identity: runs make theirs once
        key = start, length, device, dtype, self.rotary.reach(sequence_length)
        if key not in self.tables:
            turns = self.rotary.frequencies(self.dim, self.base, sequence_length)
            frequencies = torch.tensor(turns, dtype=torch.float64, device=device)
            positions = start if isinstance(start, Tensor) else torch.arange(start, start + length, device=device)
            angles = torch.outer(positions.double(), frequencies).unsqueeze(1)
            self._make_room(len(positions), int(positions[-1]) + 1)
            cos, sin = (made.mul_(self.rotary.magnitude) for made in (angles.cos(), angles.sin()))
            self.tables[key] = cos.to(dtype), sin.to(dtype)
        return self.tables[key]

    def each(self, positions: Positions, dtype: torch.dtype, sequence_length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every token, [b, s, 1, d/2], made anew: rows of one table of the sequence's positions.

        Where a scaling depends on the length it is each document's own, and its angles are in no table.
        """
        at = positions.at
        if not self.rotary.by_length:
            cos, sin = self.table(0, sequence_length, at.device, dtype)
            return cos[at], sin[at]
        lengths, which = positions.lengths.unique(return_inverse=True)
        turns = [self.rotary.frequencies(self.dim, self.base, length) for length in lengths.tolist()]
        frequencies = torch.tensor(turns, dtype=torch.float64, device=at.device)
        angles = (at.double().unsqueeze(-1) * frequencies[which]).unsqueeze(2)
        cos, sin = (made.mul_(self.rotary.magnitude) for made in (angles.cos(), angles.sin()))
        return cos.to(dtype), sin.to(dtype)

    def _make_room(self, tokens: int, end: int) -> None:
        """For one more table: all others go when there are too many for the longest sequence so far."""
        self._longest = max(self._longest, end)
        if self._tokens + tokens > KEPT_SEQUENCES * self._longest:
            self.tables.clear()
            self._tokens = 0
        self._tokens += tokens

    def __call__(self, x: Tensor, start: Start, sequence_length: int = 0) -> Tensor:
        """Rotate x [b, s, heads, d]."""
        if isinstance(start, Positions):
            return _RotateEach.apply(x, self, start, sequence_length)  # type: ignore[no-any-return]
        cos, sin = self.table(start, x.shape[1], x.device, x.dtype, sequence_length)
        return _Rotate.apply(x, cos, sin, self.turned)  # type: ignore[no-any-return]


class Ropes:
    """The tables of a model's layers: those of the same base and scaling share theirs."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._made: dict[tuple[float, Rotary], Rope] = {}

    def of(self, layer: int) -> Rope | None:
        """None where positions are not rotary."""
        if self.shape.positions != "rope":
            return None
        kind = self.shape.rotary_of(layer)
        if kind not in self._made:
            self._made[kind] = Rope(self.shape.rotated, *kind)
        return self._made[kind]


class _Rotate(Function):
    """Pairs (x_i, x_{i + d/2}) by angles; the gradient is turned back. No temporaries: x is as wide as a layer's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, turned: Turned) -> Tensor:
        ctx.cos, ctx.sin, ctx.turned = cos, sin, turned  # tables, which stay
        return turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.turned(grad, ctx.cos, ctx.sin, -1), None, None, None


class _RotateEach(Function):
    """As `_Rotate`, of tokens in documents: their cos and sin are made in the backward again, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Rope, positions: Positions, sequence_length: int) -> Tensor:
        ctx.rope, ctx.positions, ctx.sequence_length = rope, positions, sequence_length
        return rope.turned(x, *rope.each(positions, x.dtype, sequence_length), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.rope.each(ctx.positions, grad.dtype, ctx.sequence_length)
        return ctx.rope.turned(grad, cos, sin, -1), None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """x [b, s, heads, d] turned by angles of these cosines and sines; back where `direction` is -1."""
    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        made[..., size:] = x[..., size:]
    (first, second), (new_first, new_second) = (t[..., :size].chunk(2, -1) for t in (x, made))
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return made


Turned = Callable[[Tensor, Tensor, Tensor, int], Tensor]
