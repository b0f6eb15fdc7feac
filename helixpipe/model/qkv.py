"""qkv(n, start) -> q [b, s, heads, d], k and v [b, s, kv_heads, d]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.divided import TensorDivided
from helixpipe.model.linear import Linear
from helixpipe.model.norm import norm
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Rope, Start
from helixpipe.parts.shape import ModelShape


class QKV(TensorDivided):
    """Linear layers, norms over the head size where a model has them, rotary positions."""

    def __init__(self, shape: ModelShape, rope: Rope | None) -> None:
        super().__init__()
        self.q = Linear(shape.hidden, shape.q_size, bias=shape.qkv_bias)
        self.k = Linear(shape.hidden, shape.kv_size, bias=shape.qkv_bias)
        self.v = Linear(shape.hidden, shape.kv_size, bias=shape.qkv_bias)
        self.q_norm = norm(shape, shape.head_dim) if shape.qk_norm else None
        self.k_norm = norm(shape, shape.head_dim) if shape.qk_norm else None
        self.rope, self.head_dim = rope, shape.head_dim

    def forward(self, n: Tensor, start: Start) -> tuple[Tensor, Tensor, Tensor]:
        n = self.gather(n)
        q, k, v = (linear(n).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, start), self.rope(k, start)
        return q, k, v


def make(recipe: Recipe) -> nn.Module:
    return QKV(recipe.shape, recipe.rope)
