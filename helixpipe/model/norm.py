"""norm(x) -> n: the norm before attention, and every other norm."""

from __future__ import annotations

from torch import nn

from helixpipe.model.recipe import Recipe
from helixpipe.parts.shape import ModelShape


def norm(shape: ModelShape, size: int = 0) -> nn.Module:
    """RMSNorm or LayerNorm over the last dimension (0: the hidden size)."""
    kind = nn.RMSNorm if shape.norm == "rms" else nn.LayerNorm
    return kind(size or shape.hidden, eps=shape.norm_eps)


def make(recipe: Recipe) -> nn.Module:
    return norm(recipe.shape)
