"""lookup(tokens) -> e [b, s, h]: rows of this shard's words, 0 where the word is another shard's"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.embed import table
from helixpipe.model.recipe import Recipe
from helixpipe.parts.slices import rows_of


class Lookup(nn.Module):
    """Words `first` to `first` + `words` - 1 of the table."""

    def __init__(self, first: int, words: int, hidden: int) -> None:
        super().__init__()
        self.tokens = table(words, hidden)
        self.first = first

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = _Rows.apply(tokens, self.tokens.weight, self.first)  # type: ignore[no-untyped-call]
        return found


class _Rows(torch.autograd.Function):
    """Keeps nothing: tokens are the batch's."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, first: int) -> Tensor:
        ctx.tokens, ctx.first, ctx.rows = tokens, first, weight.shape[0]
        row = tokens - first
        others = (row < 0).logical_or_(row >= ctx.rows)
        return F.embedding(row.masked_fill_(others, 0), weight).masked_fill_(others.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of a table with its own rows; other shards' words are as padding to it."""
        if not ctx.needs_input_grad[1]:
            return None, None, None
        row = ctx.tokens - ctx.first
        row.masked_fill_((row < 0).logical_or_(row >= ctx.rows), ctx.rows)
        return None, torch.ops.aten.embedding_dense_backward(grad.contiguous(), row, ctx.rows, ctx.rows, False), None


def make(recipe: Recipe) -> nn.Module:
    words = rows_of(recipe.shard, recipe.shards, recipe.shape.vocabulary)
    return Lookup(words.start, len(words), recipe.shape.hidden)
