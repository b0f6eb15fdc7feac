"""embed(tokens, start) -> x [b, s, h]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Start
from helixpipe.parts.shape import ModelShape


class Embed(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.context, shape.hidden) if shape.positions == "learned" else None

    def forward(self, tokens: Tensor, start: Start) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.positions is None:
            return x
        if isinstance(start, Tensor):
            return x + self.positions(start)  # type: ignore[no-any-return]
        return x + self.positions.weight[start : start + tokens.shape[1]]


def make(recipe: Recipe) -> nn.Module:
    return Embed(recipe.shape)
