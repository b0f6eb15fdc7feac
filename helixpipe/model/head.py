"""head(x, targets, weights=None) -> loss, summed over tokens"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.activation import ACTIVATIONS
from helixpipe.model.chunked import Chunked, chunked_sum, wide_dtype
from helixpipe.model.cross_entropy import cross_entropy
from helixpipe.model.linear import Linear
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.parts.head import IGNORED
from helixpipe.parts.shape import ModelShape


def counted(*targets: Tensor) -> int:
    """How many targets count, all tensors together: those that are not -100."""
    return sum(int((each != IGNORED).sum()) for each in targets)


def takes_weights(function: Callable[..., object]) -> bool:
    """Whether a head's forward, or what it has of each token, can be called with `weights`: it says so by a parameter's name."""
    try:
        return "weights" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a scripted module tells nothing
        return False


class Transformed(nn.Module):
    """Final norm, and the transform that a model may have before its logits."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = norm(shape)
        self.dense = Linear(shape.hidden, shape.hidden, bias=shape.bias) if shape.head_transform else None
        self.dense_norm = norm(shape) if shape.head_transform else nn.Identity()

    def transformed(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        n: Tensor = self.norm(x)
        if self.dense is not None:
            n = self.dense_norm(ACTIVATIONS["gelu"](self.dense(n)))
        return n


class Head(Transformed, Chunked):
    """Final norm, transform, logits and cross entropy, summed over tokens; over slices of `chunk` tokens when that is not 0.

    `weights` [b, s], where given, multiply the loss of each token, the z-loss too.
    """

    def __init__(self, shape: ModelShape, chunk: int = 0, z_loss: float = 0.0) -> None:
        super().__init__(shape)
        self.output = Linear(shape.hidden, shape.vocabulary, bias=shape.head_transform)
        self.softcap = shape.head_softcap
        self.chunk, self.z_loss = chunk, z_loss

    def forward(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return chunked_sum(self, self.local_chunk, x, targets, *([] if weights is None else [weights]))

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        targets, *weights = (each.flatten() for each in others)
        return cross_entropy(self.logits(x), targets, self.z_loss, *weights)

    def token_losses(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross entropy of each token, [b, s], for evaluations: 0 where the target does not count.

        A class of someone's own that changes the loss gives its sum.
        """
        if type(self).forward is not Head.forward or type(self).whole is not Head.whole:
            return self.forward(x, targets) if weights is None else self.forward(x, targets, weights)
        size = self.local_chunk or x.shape[1]
        pieces = [
            F.cross_entropy(self.logits(some), wanted.flatten(), ignore_index=IGNORED, reduction="none").view_as(wanted)
            for some, wanted in zip(x.split(size, 1), targets.split(size, 1), strict=True)
        ]
        losses = torch.cat(pieces, 1)
        return losses if weights is None else losses * weights

    def logits(self, x: Tensor) -> Tensor:
        """x [b, s, h] -> [b * s, vocabulary], in float32 or wider."""
        logits = capped(self.output(self.transformed(x)), self.softcap)
        return logits.flatten(0, 1).to(wide_dtype(x))


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in their place; without a cap they are as they were."""
    return _SoftCap.apply(logits, cap) if cap else logits  # type: ignore[no-untyped-call]


class _SoftCap(torch.autograd.Function):
    """c * tanh(x / c), in the place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        ctx.mark_dirty(x.div_(cap).tanh_().mul_(cap))
        ctx.save_for_backward(x)
        ctx.cap = cap
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """1 - tanh^2, from what was made."""
        (made,) = ctx.saved_tensors
        return made.div(ctx.cap).square_().neg_().add_(1).mul_(grad), None


def make(recipe: Recipe) -> nn.Module:
    return Head(recipe.shape, recipe.head_chunk, recipe.z_loss)
