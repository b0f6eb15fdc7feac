"""final(x) -> f [b, s, h]: what the logits' shards multiply"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.head import Transformed
from helixpipe.model.recipe import Recipe


class Final(Transformed):
    """Final norm, and a head's transform."""

    def forward(self, x: Tensor) -> Tensor:
        return self.transformed(x)


def make(recipe: Recipe) -> nn.Module:
    return Final(recipe.shape)
