"""loss(scores, targets, weights=None) -> loss, summed over tokens; scores[i] [b, s, 2] of every shard of the logits"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from helixpipe.model.recipe import Recipe
from helixpipe.parts.head import IGNORED


class Loss(nn.Module):
    """Cross entropy, and the z-loss beside it, which is in the gradient alone (see `cross_entropy`).

    `weights` [b, s], where given, multiply the loss of each token, the z-loss too.
    """

    def __init__(self, z_loss: float = 0.0) -> None:
        super().__init__()
        self.z_loss = z_loss

    def forward(self, scores: Sequence[Tensor], targets: Tensor, weights: Tensor | None = None) -> Tensor:
        each: Tensor = _TokenLosses.apply(targets, weights, self.z_loss, *scores)  # type: ignore[no-untyped-call]
        return each.sum()

    def token_losses(self, scores: Sequence[Tensor], targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross entropy of each token, [b, s]: 0 where the target does not count."""
        each: Tensor = _TokenLosses.apply(targets, weights, 0.0, *scores)  # type: ignore[no-untyped-call]
        return each


class _TokenLosses(torch.autograd.Function):
    """With lse = log(sum_i exp(lse_i)): d/d(lse_i) of w (lse - hit + z lse^2) = w (1 + 2 z lse) exp(lse_i - lse)."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, weights: Tensor | None, z_loss: float, *scores: Tensor) -> Tensor:
        each, hits = torch.stack(scores).unbind(-1)  # [shards, b, s]
        lse = each.logsumexp(0)
        counts = (targets != IGNORED).to(lse.dtype)
        if weights is not None:
            counts *= weights
        shares = (each - lse).exp_()
        ctx.save_for_backward(shares, counts, lse if z_loss else None)
        ctx.z_loss = z_loss
        return (lse - hits.sum(0)).mul_(counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares, counts, lse = ctx.saved_tensors
        counts = counts * grad
        dlse = counts if lse is None else counts * (1 + 2 * ctx.z_loss * lse)
        return None, None, None, *(torch.stack((share * dlse, -counts), -1) for share in shares)


def make(recipe: Recipe) -> nn.Module:
    return Loss(recipe.z_loss)
