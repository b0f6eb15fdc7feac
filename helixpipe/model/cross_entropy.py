"""Cross entropy summed over tokens, and the z-loss beside it: z * log-sum-exp(logits)^2, which keeps logits from drifting.

The z-loss is in the gradient alone. What is returned is the cross entropy, so that losses of runs with and without compare.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helixpipe.parts.head import IGNORED


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Of logits [t, vocabulary] and targets [t], both as wide as the loss is to be."""
    if not z_loss:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return _WithZ.apply(logits, targets, z_loss)  # type: ignore[no-any-return,no-untyped-call]


class _WithZ(torch.autograd.Function):
    """d/dx (lse - x_t + z lse^2) = (1 + 2 z lse) softmax - onehot. Keeps what torch's cross entropy keeps."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        scores = logits.log_softmax(-1)
        ctx.save_for_backward(scores, logits[:, :1] - scores[:, :1], targets)  # the second is the log-sum-exp
        ctx.z_loss = z_loss
        return F.nll_loss(scores, targets, ignore_index=IGNORED, reduction="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, lse, targets = ctx.saved_tensors
        targets = targets.unsqueeze(-1)
        counts = grad * (targets != IGNORED)
        found = scores.exp().mul_(counts * (1 + 2 * ctx.z_loss * lse))
        found.scatter_add_(-1, targets.clamp(min=0), -counts.to(found.dtype))
        return found, None, None
