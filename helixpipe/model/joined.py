"""joined(e, start) -> x [b, s, h]: the sum of what every shard gives, e[i] [b, s, h]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from helixpipe.model.embed import Placed
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Start


class Joined(Placed):
    """The sum, scaled, with learned positions and a norm where a model has them."""

    def forward(self, e: Sequence[Tensor], start: Start) -> Tensor:
        return self.placed(_Sum.apply(*e), start)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, *others: Tensor) -> Tensor:
        ctx.count = 1 + len(others)
        total = first + others[0] if others else first.clone()
        for each in others[1:]:
            total.add_(each)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One tensor for all of them, which nobody writes to."""
        grad = grad.contiguous()
        return tuple(grad.view_as(grad) for _ in range(ctx.count))


def make(recipe: Recipe) -> nn.Module:
    return Joined(recipe.shape)
