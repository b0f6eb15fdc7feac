"""Rotary positions, and where the tokens of a call are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Start = int | Tensor
"""The first position of contiguous tokens; where ranks share a sequence, every token's position, int64 [s]."""
# tokens of rotary tables that are kept, in longest sequences: a few ways to cut one stay, ever new lengths do not
KEPT_SEQUENCES = 8


class Rope:
    """Rotary positions (arXiv 2104.09864), halves rotated as in Llama. Tables are made on demand and shared."""

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        self.tables: dict[tuple[Start, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._tokens = self._longest = 0

    def table(self, start: Start, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [s, 1, d/2], from angles in float64 so that far positions stay exact."""
        key = start, length, device, dtype  # a tensor is a key by its identity: runs make theirs once
        if key not in self.tables:
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
            positions = start if isinstance(start, Tensor) else torch.arange(start, start + length, device=device)
            angles = torch.outer(positions.double(), self.base**-steps).unsqueeze(1)
            self._make_room(len(positions), int(positions[-1]) + 1)
            self.tables[key] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self.tables[key]

    def _make_room(self, tokens: int, end: int) -> None:
        """For one more table: all others go when there are too many for the longest sequence so far."""
        self._longest = max(self._longest, end)
        if self._tokens + tokens > KEPT_SEQUENCES * self._longest:
            self.tables.clear()
            self._tokens = 0
        self._tokens += tokens

    def __call__(self, x: Tensor, start: Start) -> Tensor:
        """Rotate x [b, s, heads, d]."""
        cos, sin = self.table(start, x.shape[1], x.device, x.dtype)
        return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return,no-untyped-call]


class _Rotate(torch.autograd.Function):
    """Pairs (x_i, x_{i + d/2}) by angles; the gradient is turned back. No temporaries: x is as wide as a layer's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (new_first, new_second) = x.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return turned
