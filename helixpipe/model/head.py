"""head(x, targets) -> loss, summed over tokens"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helixpipe.model.chunked import Chunked, chunked_sum
from helixpipe.model.cross_entropy import IGNORED, cross_entropy
from helixpipe.model.linear import Linear
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape


def counted(*targets: Tensor) -> int:
    """How many targets count, all tensors together: those that are not -100."""
    return sum(int((each != IGNORED).sum()) for each in targets)


class Head(Chunked):
    """Final norm, logits and cross entropy, summed over tokens; over slices of `chunk` tokens when that is not 0."""

    def __init__(self, shape: ModelShape, chunk: int = 0, z_loss: float = 0.0) -> None:
        super().__init__()
        self.norm = norm(shape)
        self.output = Linear(shape.hidden, shape.vocabulary, bias=False)
        self.chunk, self.z_loss = chunk, z_loss

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return chunked_sum(self, self.local_chunk, x, targets)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        (targets,) = others
        logits = self.output(self.norm(x)).flatten(0, 1)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(wide, targets.flatten(), self.z_loss)


def make(recipe: Recipe) -> nn.Module:
    return Head(recipe.shape, recipe.head_chunk, recipe.z_loss)
