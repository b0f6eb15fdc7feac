"""norm(x) -> n: the norm before attention, and every other norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.function import Function, Saver, active, save, saved
from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension, with one number a row kept beside its input on every device.

    torch has one kernel for it on CUDA. Elsewhere it is made of operations whose results are all kept, the normalised
    input among them, in float32: there it is `_RMSNorm`. So it is where it multiplies by 1 + weight, which a narrow
    precision cannot hold and the kernel takes in no other.
    """

    maths: Maths
    """What it computes where torch has no kernel; may be compiled."""
    queue: Saver | None = None
    """What keeps tensors for its backward; None is autograd."""

    def __init__(self, size: int, eps: float, offset: bool = False) -> None:
        """`offset`: multiply by 1 + weight."""
        super().__init__(size, eps=eps)
        self.offset, self.maths = offset, Maths(rms, rms_backward)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and not self.offset:
            fused: Tensor = F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
            return fused
        made: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.offset, self.maths, active(self.queue))
        return made


class Maths(NamedTuple):
    """Operations of a part, forward and backward, on tensors and nothing else."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _RMSNorm(Function):
    """x / rms(x) * weight, or with an offset * (1 + weight), computed in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool, maths: Maths, saver: Saver | None
    ) -> Tensor:
        made: Tensor
        made, scale = maths.forward(x, weight, eps, offset)
        save(ctx, saver, x, scale)
        ctx.weight, ctx.offset, ctx.maths = weight, offset, maths
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        _held, (x, scale) = saved(ctx)
        dx, dweight = ctx.maths.backward(grad, x, ctx.weight, scale, ctx.offset, needs_dx, needs_dweight)
        return dx, dweight, None, None, None, None


def rms(x: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """What the norm makes, and 1 / rms(x) [..., 1]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(_factor(weight, offset, wide)).to(x.dtype), scale


def rms_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offset: bool, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """With y = x * scale: dweight = sum(grad y), dx = scale (grad weight - y mean(grad weight y))."""
    y = x * scale
    product = grad * y
    dweight = product.flatten(0, -2).sum(0).to(weight.dtype) if needs_dweight else None
    if not needs_dx:
        return None, dweight
    factor = _factor(weight, offset, scale.dtype)
    mean = product.mul_(factor).mean(-1, keepdim=True)
    dx = torch.mul(grad, factor, out=product).addcmul_(y, mean, value=-1).mul_(scale)
    return dx.to(x.dtype), dweight


def _factor(weight: Tensor, offset: bool, wide: torch.dtype) -> Tensor:
    return weight.to(wide) + 1 if offset else weight


NORMS = (nn.LayerNorm, RMSNorm)
"""They keep their input and not what they make, and give the same when they are run again."""


def norm(shape: ModelShape, size: int = 0) -> nn.Module:
    """RMSNorm or LayerNorm over the last dimension (0: the hidden size)."""
    if shape.norm == "rms":
        return RMSNorm(size or shape.hidden, shape.norm_eps, shape.norm_offset)
    return nn.LayerNorm(size or shape.hidden, eps=shape.norm_eps, bias=shape.norm_bias)


def make(recipe: Recipe) -> nn.Module:
    return norm(recipe.shape) if recipe.shape.has_norm_before(recipe.layer) else nn.Identity()
