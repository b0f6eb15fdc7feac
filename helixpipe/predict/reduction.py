"""Sums of gradients at a step's end: what they take, and what they hold, of ranks with the same parameters (`runtime.reduction`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from helixpipe.predict.hardware import Link
from helixpipe.predict.standing import Elements, dealt, owned_and_visiting, summed_bytes, trained
from helixpipe.predict.timeline import MemoryPoint, Timeline
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from helixpipe.predict.estimate import Setting


def reduction_s(schedule: Schedule, setting: Setting) -> float:
    """See `Estimate.reduction_s`: of the rank that takes longest. It follows from the placement alone."""
    wholes, _ = owned_and_visiting(schedule, setting.shape)
    shares, _ = owned_and_visiting(schedule, setting.share)
    return reduction_of(wholes, shares, setting)


def reduction_of(wholes: Sequence[Elements], shares: Sequence[Elements], setting: Setting) -> float:
    """The same of what each rank owns of the model, and of what one accelerator of it holds of that."""
    replicas, wide = setting.data_parallel * setting.context_parallel, setting.keeping.wide_bytes
    among, between = setting.link, setting.link if replicas > 1 else setting.tensor_link
    if setting.links is not None:
        among, between = setting.links.replicas, setting.links.copies
    elif setting.sums is not None:
        among = between = setting.sums
    slowest = 0.0
    for whole, held in zip(wholes, shares, strict=True):
        share = trained(held, setting.share)
        divided = sum(size for name, size in share.items() if size < whole[name])
        undivided = sum(share.values()) - divided
        sums_s = _all_reduce_s(divided * wide, replicas, among)
        sums_s += _all_reduce_s(undivided * wide, replicas * setting.tensor_parallel, between)
        updates = dealt(share, replicas) if setting.optimizer == "sharded" and replicas > 1 else []
        sums_s += math.fsum(among.seconds(size * wide) for size in updates if size)
        slowest = max(slowest, sums_s)
    return slowest


def with_sums(timeline: Timeline, schedule: Schedule, setting: Setting) -> Timeline:
    """With what sums of gradients hold at the step's end beside these, of ranks that never hold as much of activations."""
    held = zip(timeline.standing, timeline.peak_activation_bytes, strict=True)
    replicas = setting.data_parallel * setting.context_parallel
    if replicas * setting.tensor_parallel == 1 or all(stands.gradients_bytes <= most for stands, most in held):
        return timeline
    wholes, shares = (
        [trained(owned, shape) for owned in owned_and_visiting(schedule, shape)[0]]
        for shape in (setting.shape, setting.share)
    )
    end_s = max(timeline.makespan_s, timeline.settled_s)
    memory = []
    each = zip(timeline.memory, timeline.peak_activation_bytes, wholes, shares, strict=True)
    for points, most, whole, share in each:
        nbytes = summed_bytes(whole, share, replicas, setting.tensor_parallel, setting.keeping.wide_bytes)
        memory.append((*points, MemoryPoint(end_s, 0, nbytes)) if nbytes > most else points)
    return replace(timeline, memory=tuple(memory))


def _all_reduce_s(nbytes: float, ranks: int, link: Link | None) -> float:
    """Around a ring; None is free."""
    return 2 * (ranks - 1) * link.seconds(nbytes / ranks) if link and ranks > 1 and nbytes else 0.0
