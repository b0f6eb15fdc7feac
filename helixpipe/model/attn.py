"""attn(q, k, v, state) -> o [b, s, heads * d]"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from helixpipe.model.attention import AttentionState, attend
from helixpipe.model.recipe import Recipe


class Attention(nn.Module):
    """The part `attn`. Parameterless, so it can run on any rank."""

    attend: Callable[[Tensor, Tensor, Tensor, bool, AttentionState], Tensor] = staticmethod(attend)
    """Another where a sequence is spread over ranks."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None = None) -> Tensor:
        """o, [b, s, heads * d]."""
        return self.attend(q, k, v, self.causal, state or AttentionState())


def make(recipe: Recipe) -> nn.Module:
    return Attention(recipe.shape.causal)
