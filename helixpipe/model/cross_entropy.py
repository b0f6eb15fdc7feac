"""Cross entropy summed over tokens, and the z-loss beside it: z * log-sum-exp(logits)^2, which keeps logits from drifting.

The z-loss is in the gradient alone. What is returned is the cross entropy, so that losses of runs with and without compare.
A token's weight multiplies both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helixpipe.parts.head import IGNORED


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Of logits [t, vocabulary], as wide as the loss is to be, targets [t], and weights [t] where tokens have any."""
    if not z_loss and weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return _Weighed.apply(logits, targets, z_loss, weights)  # type: ignore[no-any-return,no-untyped-call]


class _Weighed(torch.autograd.Function):
    """d/dx w (lse - x_t + z lse^2) = w ((1 + 2 z lse) softmax - onehot). Keeps what torch's cross entropy keeps."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None) -> Tensor:
        scores = logits.log_softmax(-1)
        weights = None if weights is None else weights.to(scores.dtype)
        lse = logits[:, :1] - scores[:, :1] if z_loss else None
        ctx.save_for_backward(scores, lse, targets, weights)
        ctx.z_loss = z_loss
        if weights is None:
            return F.nll_loss(scores, targets, ignore_index=IGNORED, reduction="sum")
        return (weights * F.nll_loss(scores, targets, ignore_index=IGNORED, reduction="none")).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, lse, targets, weights = ctx.saved_tensors
        targets = targets.unsqueeze(-1)
        counts = grad * (targets != IGNORED)
        if weights is not None:
            counts = counts * weights.unsqueeze(-1)
        found = scores.exp().mul_(counts if lse is None else counts * (1 + 2 * ctx.z_loss * lse))
        found.scatter_add_(-1, targets.clamp(min=0), -counts.to(found.dtype))
        return found, None, None, None
