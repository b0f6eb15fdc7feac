"""qkv(n, start, sequence_length) -> q [b, s, heads, d], k and v [b, s, kv_heads, d]"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model.divided import TensorDivided
from helixpipe.model.linear import Linear, adaptable
from helixpipe.model.norm import NORMS, norm
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Rope, Start
from helixpipe.parts.shape import ModelShape


class QKV(TensorDivided):
    """Linear layers, norms of q and k over each head or over all of them where a model has them, rotary positions."""

    def __init__(self, shape: ModelShape, rope: Rope | None) -> None:
        super().__init__()
        self.q = adaptable(shape, "q", shape.hidden, shape.q_size, shape.qkv_bias)
        self.k = adaptable(shape, "k", shape.hidden, shape.kv_size, shape.qkv_bias)
        self.v = adaptable(shape, "v", shape.hidden, shape.kv_size, shape.qkv_bias)
        self.whole = shape.qk_norm_over == "width"
        sizes = (shape.q_size, shape.kv_size) if self.whole else (shape.head_dim, shape.head_dim)
        self.q_norm, self.k_norm = (norm(shape, size) if shape.qk_norm else None for size in sizes)
        self.rope, self.head_dim = rope, shape.head_dim

    def forward(self, n: Tensor, start: Start, sequence_length: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """`sequence_length`: of the whole sequence, on which some rotary scalings depend; 0: it ends with these tokens."""
        n = self.gather(n)
        return (
            self._heads(self.q(n), self.q_norm, start, sequence_length),
            self._heads(self.k(n), self.k_norm, start, sequence_length),
            self.v(n).unflatten(-1, (-1, self.head_dim)),
        )

    @property
    def keeps_no_result(self) -> bool:
        """Whether nothing here keeps q, k and v for its backward, or changes n: someone's own layer might."""
        return all(isinstance(inner, Linear) or type(inner) in NORMS for inner in self.children())

    def _heads(self, x: Tensor, norm: nn.Module | None, start: Start, sequence_length: int) -> Tensor:
        """One after another, so that what is no longer needed is gone before the next comes."""
        if norm is not None and self.whole:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and not self.whole:
            x = norm(x)
        return x if self.rope is None else self.rope(x, start, sequence_length)


def make(recipe: Recipe) -> nn.Module:
    return QKV(recipe.shape, recipe.ropes.of(recipe.layer))
