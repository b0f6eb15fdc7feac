"""Standing bytes: what a rank holds all step long, from the placement alone.

              master, gradient    working copy    AdamW's two moments
    float32   4 + 4               (the master)    8
    bfloat16  4 + 4               2               8
    float64   8 + 8               (the master)    16

A frozen parameter stands in the run's precision alone. Weights that visit a rank, and their gradients, come and go: they are
among the bytes of a timeline's points (`predict.guests`).

With tensor parallelism these are of one accelerator, which holds its share of some matrices and all of the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from helixpipe.mesh import buckets, deal
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping
from helixpipe.predict.timeline import Standing
from helixpipe.schedule.program import parameter_owners
from helixpipe.schedule.schedule import Schedule

Elements = dict[str, int]
"""Full name of a parameter -> elements of it."""


def standing_bytes(
    schedule: Schedule, share: ModelShape, keeping: Keeping, optimizer_shards: int = 1
) -> tuple[Standing, ...]:
    """Of each rank's accelerators, which hold the parameters of `share`.

    `optimizer_shards`: replicas that keep the optimizer's state together (ZeRO-1); bytes are of the one with most.
    """
    return standing_of(owned_and_visiting(schedule, share)[0], share, keeping, optimizer_shards)


def standing_of(
    each: Iterable[Elements], share: ModelShape, keeping: Keeping, optimizer_shards: int
) -> tuple[Standing, ...]:
    """The same of what each rank owns."""
    narrow, wide = keeping.element_bytes, keeping.wide_bytes
    copy = narrow if narrow != wide else 0
    found = []
    for owned in each:
        updated = trained(owned, share)
        masters = sum(updated.values())
        weights = masters * (wide + copy) + (sum(owned.values()) - masters) * narrow
        found.append(Standing(weights, masters * wide, max(dealt(updated, optimizer_shards)) * 2 * wide))
    return tuple(found)


def summed_bytes(whole: Elements, held: Elements, replicas: int, tensor_parallel: int, wide_bytes: int) -> int:
    """The most gradients that are put together for one sum over ranks (`runtime.reduction`), at the end of a step.

    `whole`, `held`: parameters that a rank owns, and what one of its accelerators has of them.
    """
    if replicas * tensor_parallel == 1:
        return 0
    shared: dict[int, list[int]] = {}
    for name in sorted(held):
        among = replicas * (tensor_parallel if held[name] == whole[name] else 1)
        shared.setdefault(among, []).append(held[name] * wide_bytes)
    each = (bucket for among, sizes in shared.items() if among > 1 for bucket in buckets(sizes, int))
    return max(map(sum, each), default=0)


def trained(elements: Elements, shape: ModelShape) -> Elements:
    """Those that have gradients."""
    return {name: size for name, size in elements.items() if shape.trains(name)}


def dealt(owned: Elements, replicas: int) -> list[int]:
    """Elements that each replica updates, where they divide the optimizer."""
    return [sum(owned[name] for name in names) for names in deal(owned, replicas)]


def owned_and_visiting(schedule: Schedule, shape: ModelShape) -> tuple[list[Elements], list[Elements]]:
    """Per rank, the parameters it owns, and those it uses and does not own."""
    owners = parameter_owners(schedule, shape)
    owned: list[Elements] = [{} for _ in schedule.ranks]
    visiting: list[Elements] = [{} for _ in schedule.ranks]
    for s, stage in enumerate(schedule.stages):
        for name, size in shape.parameter_elements(stage.parts).items():
            owned[owners[name]][name] = size
            for rank in schedule.ranks_of[s]:
                if rank != owners[name]:
                    visiting[rank][name] = size
    return owned, visiting
