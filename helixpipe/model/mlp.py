"""mlp(y) -> x' [b, s, h]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.activation import GELU, Activation, SwiGLU
from helixpipe.model.chunked import Chunked, chunked
from helixpipe.model.divided import Exchange, TensorDivided
from helixpipe.model.linear import Linear, activated, added
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape


class MLP(Chunked, TensorDivided):
    """Norm, GELU or SwiGLU MLP and residual add; over slices of `chunk` tokens when that is not 0."""

    def __init__(self, shape: ModelShape, chunk: int = 0) -> None:
        super().__init__()
        self.norm = norm(shape)
        self.gate = Linear(shape.hidden, shape.ffn, bias=shape.bias) if shape.gated else None
        self.up = Linear(shape.hidden, shape.ffn, bias=shape.bias)
        self.down = Linear(shape.ffn, shape.hidden, bias=shape.bias)
        self.chunk = chunk

    def divide(self, gather: Exchange, scatter: Exchange) -> None:
        super().divide(gather, scatter)
        self.down.scatter = scatter

    def forward(self, y: Tensor) -> Tensor:
        return chunked(self, self.local_chunk, y)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        n = self.gather(self.norm(x))
        activation: Activation = GELU() if self.gate is None else SwiGLU()
        wide = [self.up(n)] if self.gate is None else [self.gate(n), self.up(n)]
        del n  # not needed any more where nothing keeps it
        return added(self.down, activated(self.down, activation, *wide), x)


def make(recipe: Recipe) -> nn.Module:
    return MLP(recipe.shape, recipe.mlp_chunk)
