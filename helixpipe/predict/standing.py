"""Standing bytes: what a rank holds all step long, from the placement alone.

              master, gradient    working copy    AdamW's two moments
    float32   4 + 4               (the master)    8
    bfloat16  4 + 4               2               8
    float64   8 + 8               (the master)    16

A rank where a stage visits holds its weights in the run's precision and their gradients in the masters' beside what it owns.
"""

from __future__ import annotations

import math

from helixpipe.predict.keeping import Keeping
from helixpipe.predict.timeline import Standing
from helixpipe.schedule.program import parameter_owners
from helixpipe.schedule.schedule import Schedule
from helixpipe.shape import ModelShape


def standing_bytes(
    schedule: Schedule, shape: ModelShape, keeping: Keeping, tensor_parallel: int = 1, optimizer_shards: int = 1
) -> tuple[Standing, ...]:
    """Per rank; with tensor parallelism, of each of its accelerators. Visiting weights count all step long.

    `optimizer_shards`: replicas that keep the optimizer's state together (ZeRO-1).
    """
    owned, visiting = owned_and_visiting(schedule, shape)
    narrow, wide = keeping.element_bytes, keeping.wide_bytes
    copy = narrow if narrow != wide else 0
    found = []
    for own, visits in zip(owned, visiting, strict=True):
        sizes = own * (wide + copy) + visits * narrow, (own + visits) * wide, own * 2 * wide / optimizer_shards
        found.append(Standing(*(math.ceil(size / tensor_parallel) for size in sizes)))
    return tuple(found)


def owned_and_visiting(schedule: Schedule, shape: ModelShape) -> tuple[list[int], list[int]]:
    """Per rank, elements of the parameters it owns, and of those it uses and does not own."""
    owners = parameter_owners(schedule, shape)
    sizes: dict[str, int] = {}
    used: list[set[str]] = [set() for _ in schedule.ranks]
    for s, stage in enumerate(schedule.stages):
        for part in stage.parts:
            for local, size in shape.parameters(part).items():
                name = shape.parameter_name(part, local)
                sizes[name] = math.prod(size)
                for rank in schedule.ranks_of[s]:
                    used[rank].add(name)
    owned = [0] * len(schedule.ranks)
    for name, owner in owners.items():
        owned[owner] += sizes[name]
    visiting = [sum(sizes[name] for name in names if owners[name] != rank) for rank, names in enumerate(used)]
    return owned, visiting
