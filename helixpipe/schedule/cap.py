"""Cap: how much each rank may keep of its forwards for their backwards, and which action there is room for.

    micro-batch 0    F F F . I W I W I W     what a rank keeps of a micro-batch grows with its forwards and shrinks with its
    micro-batch 1        F F . F . . .       backwards; the ranks finish micro-batches in one order

A forward is let in where every micro-batch before its own could still be finished, one after another:

    what is missing of micro-batch j + what is kept of j and of all later ones <= cap, for all j that come before

Then the first unfinished micro-batch never waits for room, on any rank; when it is done the next one does not. So ranks that
are full always drain. That is the banker's algorithm with the order of finishing given.

An I may leave more for its W than its forward had kept. A W waits for nothing else, so what is left for it can be let go of at any
time, and one micro-batch is finished with room for one such growth, the largest, beside its forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.graph import Graph

SLACK = 1 + 1e-9
"""Sums of floats that are equal may differ by so much."""


class NoRoom(ConfigError):
    """A cap that holds no micro-batch; `least` would, in the cap's unit."""

    def __init__(self, told: str, least: float) -> None:
        super().__init__(told)
        self.least = least


@dataclass(frozen=True)
class Cap:
    """`limits[r]` is what rank r may keep. In the same unit, of each action of a graph: `holds` is what it adds (takes away, below
    0) to what waits for a backward, `leaves` to what waits for a W.
    """

    limits: tuple[float, ...]
    holds: tuple[float, ...]
    leaves: tuple[float, ...]
    graph: Graph
    reverse: bool = False
    """Whether micro-batches finish from the last to the first, as they do in reversed time."""

    @cached_property
    def adds(self) -> tuple[float, ...]:
        """Of each action what it keeps more, or less, below 0."""
        return tuple(hold + leave for hold, leave in zip(self.holds, self.leaves, strict=True))

    @cached_property
    def place(self) -> tuple[int, ...]:
        """Of each action its micro-batch's place in the order of finishing."""
        microbatches = self.microbatches
        if self.reverse:
            return tuple(microbatches - 1 - action.microbatch for action in self.graph.actions)
        return tuple(action.microbatch for action in self.graph.actions)

    @cached_property
    def microbatches(self) -> int:
        return 1 + max(action.microbatch for action in self.graph.actions)

    @cached_property
    def whole(self) -> tuple[tuple[float, ...], ...]:
        """Per rank and place, all that waits for a backward if nothing is let go of."""
        found = [[0.0] * self.microbatches for _ in range(self.graph.ranks)]
        for i, hold in enumerate(self.holds):
            if hold > 0:
                found[self.graph.rank[i]][self.place[i]] += hold
        return tuple(map(tuple, found))

    @cached_property
    def growth(self) -> tuple[tuple[float, ...], ...]:
        """Per rank and place, the most that one I leaves beyond what its forward had kept."""
        found = [[0.0] * self.microbatches for _ in range(self.graph.ranks)]
        for i, add in enumerate(self.adds):
            if self.leaves[i] > 0:
                of_rank = found[self.graph.rank[i]]
                of_rank[self.place[i]] = max(of_rank[self.place[i]], add)
        return tuple(map(tuple, found))

    @cached_property
    def backwards(self) -> Cap:
        """Time reversed: backwards take hold, forwards let go. What an I leaves beyond its forward's is not counted: nothing could
        let go of it at any time there.
        """
        holds = [-hold for hold in self.holds]
        for i, leave in enumerate(self.leaves):
            if leave > 0:  # an I, whose W takes hold of as much as it may before
                late = min(leave, holds[i])
                holds[i] -= late
                holds[self.graph.number[self.graph.actions[i].sibling(Pass.W)]] = late
        nothing = (0.0,) * len(holds)
        return Cap(self.limits, tuple(holds), nothing, self.graph.backwards, not self.reverse)

    def check(self, told: Callable[[float], str] = "{:.4g}".format) -> None:
        """Raise NoRoom where a rank cannot hold one micro-batch, with the rank that misses most. `told`: an amount in words."""
        least = [
            max(map(sum, zip(whole, growth, strict=True)), default=0.0)
            for whole, growth in zip(self.whole, self.growth, strict=True)
        ]
        rank = max(range(len(least)), key=lambda r: least[r] - self.limits[r])
        if least[rank] > self.limits[rank] * SLACK:
            raise NoRoom(
                f"schedule.memory: {told(self.limits[rank])}, and rank {rank} keeps {told(least[rank])} of one micro-batch before its "
                f"first backward; give at least {told(least[rank])}, or more ranks",
                least[rank],
            )


class Kept:
    """What ranks keep while an order is being built."""

    def __init__(self, cap: Cap) -> None:
        ranks, places = range(len(cap.limits)), cap.microbatches
        self._place, self._holds, self._leaves, self._adds = cap.place, cap.holds, cap.leaves, cap.adds
        self._limits = [limit * SLACK for limit in cap.limits]
        self._total = [0.0 for _ in ranks]
        self._held = [[0.0] * places for _ in ranks]  # for backwards
        self._missing = [list(whole) for whole in cap.whole]
        self._growth = [list(growth) for growth in cap.growth]
        self._left = [[0] * places for _ in ranks]  # actions to come
        self._growing = [[0] * places for _ in ranks]  # and of these those with a W behind
        for i, rank in enumerate(cap.graph.rank):
            self._left[rank][self._place[i]] += 1
            self._growing[rank][self._place[i]] += self._leaves[i] > 0
        self._first = [0 for _ in ranks]  # the first place that is not finished
        self._last = [-1 for _ in ranks]  # and the last that was begun

    def has_room(self, action: int, rank: int) -> bool:
        """Whether an action may be taken now."""
        add, limit = self._adds[action], self._limits[rank]
        if add <= 0:
            return True
        if self._total[rank] + add > limit:
            return False
        if self._leaves[action] > 0:
            return True  # an I: its W lets go of it at any time
        later = self._holds[action]
        held, missing, growth, own = self._held[rank], self._missing[rank], self._growth[rank], self._place[action]
        for place in range(max(self._last[rank], own), self._first[rank] - 1, -1):
            later += held[place]
            if place < own and missing[place] + later + growth[place] > limit:
                return False
        return True

    def take(self, action: int, rank: int) -> None:
        """It is taken."""
        hold, place = self._holds[action], self._place[action]
        self._total[rank] += self._adds[action]
        self._held[rank][place] += hold
        if hold > 0:
            self._missing[rank][place] -= hold
            self._last[rank] = max(self._last[rank], place)
        if self._leaves[action] > 0:
            self._growing[rank][place] -= 1
            if not self._growing[rank][place]:
                self._growth[rank][place] = 0.0
        left = self._left[rank]
        left[place] -= 1
        while self._first[rank] < len(left) and not left[self._first[rank]]:
            self._held[rank][self._first[rank]] = 0.0
            self._first[rank] += 1


def cap_of(
    graph: Graph, limits: Sequence[float], kept: Callable[[Action], float], put_off: Callable[[Action], float]
) -> Cap:
    """The cap of a graph: `kept` is what a forward leaves for its backward, `put_off` what of it an I leaves for its W.

    An R is counted as nothing.
    """
    holds, leaves = [], []
    for action in graph.actions:
        forward = action.sibling(Pass.F)
        sign = {Pass.F: 1, Pass.B: -1, Pass.I: -1}.get(action.kind, 0)
        holds.append(sign * kept(forward) if sign else 0.0)
        late = {Pass.I: 1, Pass.W: -1}.get(action.kind, 0)
        leaves.append(late * put_off(forward) if late else 0.0)
    return Cap(tuple(limits), tuple(holds), tuple(leaves), graph)
