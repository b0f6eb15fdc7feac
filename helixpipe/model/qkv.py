"""qkv(n, start) -> q [b, s, heads, d], k and v [b, s, kv_heads, d]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.divided import TensorDivided
from helixpipe.model.linear import Linear
from helixpipe.model.norm import NORMS, norm
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
        return (
            self._heads(self.q(n), self.q_norm, start),
            self._heads(self.k(n), self.k_norm, start),
            self.v(n).unflatten(-1, (-1, self.head_dim)),
        )

    @property
    def keeps_no_result(self) -> bool:
        """Whether nothing here keeps q, k and v for its backward, or changes n: someone's own layer might."""
        return all(isinstance(inner, Linear) or type(inner) in NORMS for inner in self.children())

    def _heads(self, x: Tensor, norm: nn.Module | None, start: Start) -> Tensor:
        """One after another, so that what is no longer needed is gone before the next comes."""
        x = x.unflatten(-1, (-1, self.head_dim))
        x = x if norm is None else norm(x)
        return x if self.rope is None else self.rope(x, start)


def make(recipe: Recipe) -> nn.Module:
    return QKV(recipe.shape, recipe.rope)
