"""A schedule with its vocabulary spread: a family's own order, with shards taken as soon as they are ready.

It shares no code with the library's construction of such orders: what runs must be right whatever the order is.
"""

from __future__ import annotations

from helixpipe.parts.part import Part, chain
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage


def spread(schedule: Schedule, shards: int = 0, moved: int = 0) -> Schedule:
    """`shards`: one a rank when not given. Shard i of the table is on rank i, and of the head on rank i + `moved`."""
    ranks = len(schedule.ranks)
    shards = shards or ranks
    parts = chain(schedule.layers, (), shards)
    lookups, (joined,) = parts[:shards], parts[shards : shards + 1]
    final, logits, loss = parts[-shards - 2], parts[-shards - 1 : -1], parts[-1]
    in_place = {Part("embed", 0): joined, Part("head", schedule.layers): final}
    family = [Stage(tuple(in_place.get(part, part) for part in stage.parts), stage.home) for stage in schedule.stages]
    stages = (*(Stage((p,)) for p in lookups), *family, *(Stage((p,)) for p in logits), Stage((loss,)))
    last = shards + len(family) - 1
    orders = [
        [action._replace(stage=action.stage + shards) for action in order] for order in schedule.ranks
    ]  # what a rank still has to do of the family's
    splits = any(action.kind is Pass.I for order in orders for action in order)
    backwards = (Pass.I, Pass.W) if splits else (Pass.B,)
    units = [(mb, seg) for mb in range(schedule.microbatches) for seg in range(schedule.segments)]
    extra: list[list[Action]] = [[] for _ in range(ranks)]
    for shard in range(shards):
        for kind in (Pass.F, *backwards):
            extra[shard % ranks] += [Action(shard, kind, *unit) for unit in units]
            extra[(shard + moved) % ranks] += [Action(last + 1 + shard, kind, *unit) for unit in units]
    for kind in (Pass.F, Pass.B):
        for unit in units:
            rank = next(r for r, order in enumerate(orders) if Action(last, Pass.F, *unit) in order)
            extra[rank].append(Action(last + 1 + shards, kind, *unit))
    everything = Schedule(stages, tuple((*a, *b) for a, b in zip(orders, extra, strict=True)))
    done: set[Action] = set()
    found: list[list[Action]] = [[] for _ in range(ranks)]
    while any(orders) or any(extra):
        before = len(done)
        for order, more, mine in zip(orders, extra, found, strict=True):
            ready = [a for a in more if all(needed in done for needed in everything.dependencies(a))]
            if not ready and order and all(needed in done for needed in everything.dependencies(order[0])):
                ready = order[:1]
            for action in ready[:1]:
                (more if action in more else order).remove(action)
                mine.append(action)
                done.add(action)
        assert len(done) > before, "nothing can go on"
    return Schedule(stages, tuple(map(tuple, found)))
