"""Holding: the part of the model that holds a schedule back, where one rank has more to do than the others.

the head, on rank 7: 13.9 s busy where the others have 12.2 s
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable
from typing import NamedTuple

from helixpipe.parts.part import FIRST, LAYER_KINDS, Part
from helixpipe.predict.estimate import Estimate

LEAST = 0.02
"""A rank that is busy longer than the others by less than this share holds nothing back."""
_LAYERS = "layers"
_WORDS = {
    FIRST: "the embedding", "joined": "summing up the embedding's shards", "lookup": "its shard of the embedding",
    "final": "the final norm", "logits": "its shard of the head",
}  # fmt: skip


class Holding(NamedTuple):
    """`what` of the model, on which rank, its seconds and the mean of the other ranks'."""

    what: str
    rank: int
    busy_s: float
    others_s: float


def holding(estimate: Estimate) -> Holding | None:
    """What keeps one rank busy for longer than the others; None where all have about as much to do."""
    busy = estimate.timeline.busy_s
    if len(busy) < 2:
        return None
    rank = max(range(len(busy)), key=lambda each: busy[each])
    others_s = statistics.mean(seconds for each, seconds in enumerate(busy) if each != rank)
    if busy[rank] <= others_s * (1 + LEAST):
        return None
    return Holding(_what(estimate, rank), rank, busy[rank], others_s)


def _what(estimate: Estimate, rank: int) -> str:
    """Of what the rank runs, the kind of part that takes most beyond what it takes on the other ranks."""
    by_rank, layers = _of_ranks(estimate)
    others = [each for each in range(len(by_rank)) if each != rank]
    beyond = {
        kind: mine - statistics.mean(by_rank[o].get(kind, 0.0) for o in others) for kind, mine in by_rank[rank].items()
    }
    kind = max(beyond, key=lambda each: beyond[each])
    if kind != _LAYERS:
        return _WORDS.get(kind, f"the {kind}")
    return f"its {len(layers[rank])} layers, {statistics.mean(len(layers[o]) for o in others):.3g} on others"


def _of_ranks(estimate: Estimate) -> tuple[list[dict[str, float]], list[set[int]]]:
    """Of each rank the seconds of one micro-batch's parts by kind, all of a layer together; and the layers it runs."""
    costs, batch, shape = estimate.setting.costs, estimate.program.batches[0], estimate.setting.shape
    segments = range(len(batch.segment_lengths))
    known: dict[Hashable, float] = {}

    def seconds(part: Part) -> float:
        like = shape.alike(part)
        if like not in known:
            each = (costs.forward_s, costs.input_s, costs.weight_s)
            known[like] = math.fsum(price(part, batch, segment) for price in each for segment in segments)
        return known[like]

    found: list[dict[str, float]] = [{} for _ in estimate.schedule.ranks]
    layers: list[set[int]] = [set() for _ in estimate.schedule.ranks]
    for stage, ranks in zip(estimate.schedule.stages, estimate.schedule.ranks_of, strict=True):
        for part in stage.parts:
            is_layers = part.about.opaque or part.kind in LAYER_KINDS
            for rank in ranks:
                kind = _LAYERS if is_layers else part.kind
                found[rank][kind] = found[rank].get(kind, 0.0) + seconds(part) / len(ranks)
                if is_layers:
                    layers[rank].add(part.layer)
    return found, layers
