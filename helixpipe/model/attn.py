"""attn(q, k, v, state) -> o [b, s, heads * d]"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from helixpipe.model.attention import AttentionState, Rule, attend
from helixpipe.model.function import Saver
from helixpipe.model.recipe import Recipe


class Attention(nn.Module):
    """The part `attn`. Parameterless, so it can run on any rank."""

    attend: Callable[[Tensor, Tensor, Tensor, Rule, AttentionState], Tensor] = staticmethod(attend)
    """Another where a sequence is spread over ranks."""
    queue: Saver | None = None
    """What keeps tensors for its backward; None is autograd."""

    def __init__(self, causal: bool, window: int = 0, softcap: float = 0.0, scale: float = 0.0) -> None:
        """`window`: a token at i sees j where |i - j| < window; 0 is all. `softcap`: c of c * tanh(score / c), 0 is none.
        `scale`: what q.k is multiplied by, 0 is head_dim ** -0.5. Raises ConfigError.
        """
        super().__init__()
        self.rule = Rule(causal, window, softcap, scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None = None) -> Tensor:
        """o, [b, s, heads * d]."""
        return self.attend(q, k, v, self.rule, state or AttentionState())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self.rule).items() if value)


def make(recipe: Recipe) -> nn.Module:
    shape = recipe.shape
    return Attention(shape.causal, shape.window_of(recipe.layer), shape.softcap, shape.attention_scale)
