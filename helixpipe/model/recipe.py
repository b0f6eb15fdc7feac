"""Recipe: what the module of a part is made from."""

from __future__ import annotations

from dataclasses import dataclass

from helixpipe.model.rope import Ropes
from helixpipe.parts.shape import ModelShape


@dataclass(frozen=True)
class Recipe:
    """A model's shape, its rotary tables, tokens at a time through the MLP and the head (0: all at once), and the layer."""

    shape: ModelShape
    ropes: Ropes
    mlp_chunk: int = 0
    head_chunk: int = 0
    layer: int = 0
    """Where the part stands."""
    z_loss: float = 0.0
    """What (log-sum-exp of the logits)^2 weighs in the gradient."""
    shard: int = 0
    """Which of `shards` the part is."""
    shards: int = 1
