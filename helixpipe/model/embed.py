"""embed(tokens, start) -> x [b, s, h]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Start
from helixpipe.parts.shape import ModelShape


class Embed(nn.Module):
    """Rows of the table, scaled, with learned positions and a norm where a model has them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = _table(shape.vocabulary, shape.hidden)
        self.positions = _table(shape.context, shape.hidden) if shape.positions == "learned" else None
        self.norm = norm(shape) if shape.embed_norm else None
        self.scale = shape.embed_scale

    def forward(self, tokens: Tensor, start: Start) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.scale != 1:
            x = x.mul_(float(torch.tensor(self.scale, dtype=x.dtype)))
        if self.positions is not None:
            if not isinstance(start, int):
                x = x + self.positions(start if isinstance(start, Tensor) else start.at)
            else:
                x = x + self.positions.weight[start : start + tokens.shape[1]]
        return x if self.norm is None else self.norm(x)


def _table(rows: int, hidden: int) -> nn.Embedding:
    """Without values: drawing normal ones on the meta device takes a second, in which torch imports its compiler."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, hidden), freeze=False)
    return table


def make(recipe: Recipe) -> nn.Module:
    return Embed(recipe.shape)
