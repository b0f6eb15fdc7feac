"""block(x, start, sequence_length, state) -> x': a whole layer, where it cannot be split"""

from __future__ import annotations

from torch import Tensor, nn

from helixpipe.model import attn, mlp, norm, proj, qkv
from helixpipe.model.attention import AttentionState
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Start


class Block(nn.Module):
    """A whole layer as one part: what an unsplittable layer looks like to the rest."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.norm, self.qkv, self.attn = norm.make(recipe), qkv.make(recipe), attn.make(recipe)
        self.proj, self.mlp = proj.make(recipe), mlp.make(recipe)

    def forward(self, x: Tensor, start: Start, sequence_length: int = 0, state: AttentionState | None = None) -> Tensor:
        return self.mlp(self.proj(self.attn(*self.qkv(self.norm(x), start, sequence_length), state), x))  # type: ignore[no-any-return]


def make(recipe: Recipe) -> nn.Module:
    return Block(recipe)
