"""logits(f, targets) -> scores [b, s, 2], float32 or wider: log-sum-exp over this shard's words, and the target's logit or 0"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helixpipe.model.chunked import Chunked, Made, chunked_into, wide_dtype
from helixpipe.model.head import capped
from helixpipe.model.linear import Linear
from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import rows_of


class Logits(Chunked):
    """Words `first` to `first` + `words` - 1 of the head; over slices of `chunk` tokens when that is not 0."""

    def __init__(self, shape: ModelShape, first: int, words: int, chunk: int = 0) -> None:
        super().__init__()
        self.output = Linear(shape.hidden, words, bias=shape.head_transform)
        self.first, self.softcap, self.chunk = first, shape.head_softcap, chunk

    def forward(self, f: Tensor, targets: Tensor) -> Tensor:
        made = Made((*targets.shape, 2), wide_dtype(f))
        return chunked_into(made, self, self.local_chunk, f, targets)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        (targets,) = others
        narrow = capped(self.output(x), self.softcap)
        wide = narrow.to(wide_dtype(x))
        is_own = wide is not narrow or not self.softcap
        return _Scores.apply(wide, targets - self.first, is_own)  # type: ignore[no-any-return,no-untyped-call]


class _Scores(torch.autograd.Function):
    """d/dx of (log(sum(exp(x))), x_t) is (softmax, onehot): no more of the other shards is needed than these two's gradients."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, words: Tensor, is_own: bool) -> Tensor:
        """Of logits [b, s, words], each token's word [b, s]. Where `is_own`, nobody else reads them: exponentials take their place."""
        logits, words = logits.detach(), words.unsqueeze(-1)
        others = (words < 0).logical_or_(words >= logits.shape[-1])
        words = words.masked_fill(others, 0)
        hit = logits.gather(-1, words).masked_fill_(others, 0)
        top = logits.amax(-1, keepdim=True)
        exponentials = (logits.sub_(top) if is_own else logits - top).exp_()
        sums = exponentials.sum(-1, keepdim=True)
        ctx.save_for_backward(exponentials, sums)
        ctx.words, ctx.others = words, others
        return torch.cat((top.add_(sums.log()), hit), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exponentials, sums = ctx.saved_tensors
        dlse, dhit = grad.split(1, -1)
        found = exponentials.mul_(dlse / sums)
        return found.scatter_add_(-1, ctx.words, dhit.masked_fill(ctx.others, 0)), None, None


def make(recipe: Recipe) -> nn.Module:
    words = rows_of(recipe.shard, recipe.shards, recipe.shape.vocabulary)
    return Logits(recipe.shape, words.start, len(words), recipe.head_chunk)
