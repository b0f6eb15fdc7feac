"""proj(o [b, s, heads * d], x) -> y [b, s, h]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.divided import Exchange, TensorDivided
from helixpipe.model.linear import adaptable, added
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape


class Proj(TensorDivided):
    """Attention's output projection, a norm of it where a model has one, and the residual add."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.o = adaptable(shape, "o", shape.q_size, shape.hidden, shape.o_bias or shape.bias)
        self.norm = norm(shape) if shape.norms_after else None

    def divide(self, gather: Exchange, scatter: Exchange) -> None:
        self.o.scatter = scatter

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        made = self.o(o)
        return added(self.o, made, x) if self.norm is None else added(self.norm, self.norm(made), x)


def make(recipe: Recipe) -> nn.Module:
    return Proj(recipe.shape)
