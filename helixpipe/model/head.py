"""head(x, targets) -> loss, summed over tokens"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.chunked import Chunked, chunked_sum
from helixpipe.model.linear import Linear
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape

IGNORED = -100
"""A target that counts for nothing, as in torch's cross entropy."""


def counted(*targets: Tensor) -> int:
    """How many targets count, all tensors together: those that are not -100."""
    return sum(int((each != IGNORED).sum()) for each in targets)


class Head(Chunked):
    """Final norm, logits and cross entropy, summed over tokens; over slices of `chunk` tokens when that is not 0."""

    def __init__(self, shape: ModelShape, chunk: int = 0) -> None:
        super().__init__()
        self.norm = norm(shape)
        self.output = Linear(shape.hidden, shape.vocabulary, bias=False)
        self.chunk = chunk

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return chunked_sum(self, self.local_chunk, x, targets)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        (targets,) = others
        logits = self.output(self.norm(x)).flatten(0, 1)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def make(recipe: Recipe) -> nn.Module:
    return Head(recipe.shape, recipe.head_chunk)
