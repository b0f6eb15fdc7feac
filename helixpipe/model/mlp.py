"""mlp(y) -> x' [b, s, h]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.activation import ACTIVATIONS
from helixpipe.model.chunked import Chunked, chunked
from helixpipe.model.divided import Exchange, TensorDivided
from helixpipe.model.linear import activated, adaptable, added
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.parts.mlp import MLPKind
from helixpipe.parts.shape import ModelShape


class MLP(Chunked, TensorDivided):
    """Norm before, MLP, norm after and residual add; over slices of `chunk` tokens when that is not 0."""

    def __init__(self, shape: ModelShape, chunk: int = 0) -> None:
        super().__init__()
        self.norm = norm(shape) if shape.norms_before else None
        self.gate = adaptable(shape, "gate", shape.hidden, shape.ffn, shape.bias) if shape.gated else None
        self.up = adaptable(shape, "up", shape.hidden, shape.ffn, shape.bias)
        self.down = adaptable(shape, "down", shape.ffn, shape.hidden, shape.bias)
        if not MLPKind.keeps_multiplied(shape):
            self.up.keeps_input = False
            if self.gate is not None:
                self.gate.keeps_input = False
        self.after = norm(shape) if shape.norms_after else None
        self.activation = ACTIVATIONS[shape.mlp]
        self.chunk = chunk

    def divide(self, gather: Exchange, scatter: Exchange) -> None:
        super().divide(gather, scatter)
        self.down.scatter = scatter

    def forward(self, y: Tensor) -> Tensor:
        return chunked(self, self.local_chunk, y)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        n = self.gather(x if self.norm is None else self.norm(x))
        wide = [self.up(n)] if self.gate is None else [self.gate(n), self.up(n)]
        del n  # not needed any more where nothing keeps it
        made = activated(self.down, self.activation, *wide)
        del wide
        return added(self.down, made, x) if self.after is None else added(self.after, self.after(made), x)


def make(recipe: Recipe) -> nn.Module:
    return MLP(recipe.shape, recipe.mlp_chunk)
