"""embed(tokens, start) -> x [b, s, h]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Start
from helixpipe.parts.shape import ModelShape


class Placed(nn.Module):
    """What becomes of the table's rows: scaled, with learned positions and a norm where a model has them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.positions = table(shape.context, shape.hidden) if shape.positions == "learned" else None
        self.norm = norm(shape) if shape.embed_norm else None
        self.scale = shape.embed_scale

    def placed(self, x: Tensor, start: Start) -> Tensor:
        """Of rows [b, s, h] that are nobody else's."""
        if self.scale != 1:
            x = x.mul_(float(torch.tensor(self.scale, dtype=x.dtype)))
        if self.positions is not None:
            if not isinstance(start, int):
                x = x + self.positions(start if isinstance(start, Tensor) else start.at)
            else:
                x = x + self.positions.weight[start : start + x.shape[1]]
        return x if self.norm is None else self.norm(x)


class Embed(Placed):
    """Rows of the table, placed."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.tokens = table(shape.vocabulary, shape.hidden)

    def forward(self, tokens: Tensor, start: Start) -> Tensor:
        return self.placed(self.tokens(tokens), start)


def table(rows: int, hidden: int) -> nn.Embedding:
    """Without values: drawing normal ones on the meta device takes a second, in which torch imports its compiler."""
    found: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, hidden), freeze=False)
    return found


def make(recipe: Recipe) -> nn.Module:
    return Embed(recipe.shape)
