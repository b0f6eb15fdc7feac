"""norm(x) -> n: the norm before attention, and every other norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension, with one number a row kept beside its input on every device.

    torch has one kernel for it on CUDA. Elsewhere it is made of operations whose results are all kept, the normalised
    input among them, in float32: there it is `_RMSNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            fused: Tensor = F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
            return fused
        made: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return made


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, computed in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        made: Tensor = (x * scale).mul_(weight).to(x.dtype)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With y = x * scale: dweight = sum(grad y), dx = scale (grad weight - y mean(grad weight y))."""
        x, weight, scale = ctx.saved_tensors
        y = x * scale
        product = grad * y
        dweight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        mean = product.mul_(weight).mean(-1, keepdim=True)
        dx = torch.mul(grad, weight, out=product).addcmul_(y, mean, value=-1).mul_(scale)
        dx = dx.to(x.dtype)
        return dx, dweight, None


NORMS = (nn.LayerNorm, RMSNorm)
"""They keep their input and not what they make, and give the same when they are run again."""


def norm(shape: ModelShape, size: int = 0) -> nn.Module:
    """RMSNorm or LayerNorm over the last dimension (0: the hidden size)."""
    if shape.norm == "rms":
        return RMSNorm(size or shape.hidden, eps=shape.norm_eps)
    return nn.LayerNorm(size or shape.hidden, eps=shape.norm_eps)


def make(recipe: Recipe) -> nn.Module:
    return norm(recipe.shape)
