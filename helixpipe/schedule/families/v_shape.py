"""V placement: rank r holds stages r and 2p-1-r, so the last stage is where the first one is, on rank 0.

    chunk 0    0 -> 1 -> 2 -> 3        forwards go down the ranks and come up again,
    chunk 1    7 <- 6 <- 5 <- 4        backwards the same way; the turn needs no message

`Bench` is what the greedy families build on: they decide what a rank does next, it keeps the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage

CHUNKS = (0, 1)


def v_stages(
    ranks: int, layers: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> tuple[Stage, ...]:
    return split_layers(layers, ranks, opaque, ends, per_rank=2)


def stage_of(rank: int, chunk: int, ranks: int) -> int:
    return rank if chunk == 0 else 2 * ranks - 1 - rank


class Bench:
    """A V schedule in the making: what each rank has done, when it is free, what it keeps and what waits."""

    def __init__(self, ranks: int, microbatches: int, costs: Sequence[float]) -> None:
        if len(costs) != 3 or not all(0 < cost < float("inf") for cost in costs):
            raise ConfigError(f"schedule.costs: {tuple(costs)}; give three times above 0, of F, I and W of one stage")
        self.ranks, self.microbatches = ranks, microbatches
        self.cost = dict(zip((Pass.F, Pass.I, Pass.W), costs, strict=True))
        self.orders: list[list[Action]] = [[] for _ in range(ranks)]
        self.free = [0.0] * ranks  # when the rank has done what it was given
        self.idle = [0.0] * ranks  # and how long it stood still in between
        self.kept = [[0, 0] for _ in range(ranks)]  # forwards of each chunk whose W has not come
        self.weights: list[deque[Action]] = [deque() for _ in range(ranks)]  # W's to come
        self._count = [{(kind, c): 0 for kind in (Pass.F, Pass.I) for c in CHUNKS} for _ in range(ranks)]
        self._end: dict[Action, float] = {}

    def done(self, rank: int, kind: Pass, chunk: int) -> int:
        """How many micro-batches the rank has taken through this pass of this chunk."""
        return self._count[rank][kind, chunk]

    def all_done(self, rank: int, kind: Pass, chunk: int) -> bool:
        return self.done(rank, kind, chunk) == self.microbatches

    def complete(self) -> bool:
        """Whether every I is there; the W's that wait can follow at any time."""
        return all(self.all_done(rank, Pass.I, chunk) for rank in range(self.ranks) for chunk in CHUNKS)

    def arrival(self, rank: int, kind: Pass, chunk: int) -> float | None:
        """When the inputs of the rank's next such action are there; None while that is not known."""
        mb, stage = self.done(rank, kind, chunk), stage_of(rank, chunk, self.ranks)
        if mb == self.microbatches:
            return None
        if kind is Pass.F:
            return self._end.get(Action(stage - 1, Pass.F, mb)) if stage else 0.0
        own = self._end.get(Action(stage, Pass.F, mb))
        after = self._end.get(Action(stage + 1, Pass.I, mb)) if stage + 1 < 2 * self.ranks else own
        return None if own is None or after is None else max(own, after)

    def put(self, rank: int, kind: Pass, chunk: int) -> None:
        """Give the rank its next such action, as soon as its inputs are there."""
        at = self.arrival(rank, kind, chunk)
        assert at is not None
        action = Action(stage_of(rank, chunk, self.ranks), kind, self.done(rank, kind, chunk))
        if self.orders[rank]:
            self.idle[rank] += max(0.0, at - self.free[rank])
        self._end[action] = self.free[rank] = max(at, self.free[rank]) + self.cost[kind]
        self._count[rank][kind, chunk] += 1
        self.orders[rank].append(action)
        if kind is Pass.F:
            self.kept[rank][chunk] += 1
        else:
            self.weights[rank].append(action.sibling(Pass.W))

    def put_weight(self, rank: int) -> None:
        """Give the rank the W that waits longest."""
        action = self.weights[rank].popleft()
        self.orders[rank].append(action)
        self.free[rank] += self.cost[Pass.W]
        self.kept[rank][0 if action.stage == rank else 1] -= 1

    def schedule(self, stages: tuple[Stage, ...]) -> Schedule:
        for rank in range(self.ranks):
            while self.weights[rank]:
                self.put_weight(rank)
        return Schedule(stages, tuple(map(tuple, self.orders)))
