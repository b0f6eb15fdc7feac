"""Layers to stages, for the families that cut the chain only at x."""

from __future__ import annotations

from collections.abc import Collection

from helixpipe.errors import ConfigError
from helixpipe.schedule.parts import Stage, chain, cut, layer_parts


def split_layers(layers: int, stages: int, opaque: Collection[int] = ()) -> tuple[Stage, ...]:
    """`stages` runs of whole layers; embed joins the first and head the last.

    When layers do not divide, the middle stages take one more, since the ends carry embed and head.
    """
    if layers < stages:
        raise ConfigError(f"schedule.ranks: {layers} layers cannot fill {stages} stages; use at most {layers} ranks")
    few, more = divmod(layers, stages)
    # the ends give way first: the last (its head is the heavier), then the first
    by_weight = [*range(1, stages - 1), 0, stages - 1] if stages > 1 else [0]
    count = [few] * stages
    for stage in by_weight[:more]:
        count[stage] += 1
    starts = [sum(count[:s]) for s in range(1, stages)]
    before = {layer_parts(layer, layer in opaque)[0] for layer in starts}
    return tuple(Stage(parts) for parts in cut(chain(layers, opaque), before))
