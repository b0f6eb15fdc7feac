"""Cap: how much each rank may keep of its forwards for their backwards, and which forward there is room for.

    micro-batch 0    F F F . B B .       what a rank keeps of a micro-batch grows with its forwards and shrinks with its
    micro-batch 1        F F F F B       backwards; the ranks finish micro-batches in one order

A forward is let in where every micro-batch before its own could still be finished, one after another:

    what is missing of micro-batch j + what is kept of j and of all later ones <= cap, for all j that come before

Then the first unfinished micro-batch never waits for room, on any rank; when it is done the next one does not. So ranks that
are full always drain. That is the banker's algorithm with the order of finishing given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """`limits[r]` is what rank r may keep; `adds` what each action of a graph keeps more (less, below 0); the same unit."""

    limits: tuple[float, ...]
    adds: tuple[float, ...]
    graph: Graph
    reverse: bool = False
    """Whether micro-batches finish from the last to the first, as they do in reversed time."""

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
        """Per rank and place, all that is kept of a micro-batch if nothing is let go of."""
        found = [[0.0] * self.microbatches for _ in range(self.graph.ranks)]
        for i, add in enumerate(self.adds):
            if add > 0:
                found[self.graph.rank[i]][self.place[i]] += add
        return tuple(map(tuple, found))

    @cached_property
    def backwards(self) -> Cap:
        """Time reversed: backwards take hold, forwards let go."""
        adds = tuple(-add for add in self.adds)
        return replace(self, adds=adds, graph=self.graph.backwards, reverse=not self.reverse)

    def check(self, told: Callable[[float], str] = "{:.4g}".format) -> None:
        """Raise NoRoom where a rank cannot hold one micro-batch, with the rank that misses most. `told`: an amount in words."""
        least = [max(whole, default=0.0) for whole in self.whole]
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
        self._cap, self._place, self._adds = cap, cap.place, cap.adds
        self._limits = [limit * SLACK for limit in cap.limits]
        self._kept = [[0.0] * cap.microbatches for _ in cap.limits]
        self._missing = [list(whole) for whole in cap.whole]
        self._left = [[0] * cap.microbatches for _ in cap.limits]  # actions to come
        for i, rank in enumerate(cap.graph.rank):
            self._left[rank][self._place[i]] += 1
        self._first = [0] * len(cap.limits)  # the first place that is not finished
        self._last = [-1] * len(cap.limits)  # and the last that was begun

    def has_room(self, action: int, rank: int) -> bool:
        """Whether an action may be taken now."""
        add, own = self._adds[action], self._place[action]
        if add <= 0:
            return True
        kept, missing, limit = self._kept[rank], self._missing[rank], self._limits[rank]
        later = add
        for place in range(max(self._last[rank], own), self._first[rank] - 1, -1):
            later += kept[place]
            if place < own and missing[place] + later > limit:
                return False
        return own == self._first[rank] or later <= limit

    def take(self, action: int, rank: int) -> None:
        """It is taken."""
        add, place = self._adds[action], self._place[action]
        self._kept[rank][place] += add
        if add > 0:
            self._missing[rank][place] -= add
            self._last[rank] = max(self._last[rank], place)
        left = self._left[rank]
        left[place] -= 1
        while self._first[rank] < len(left) and not left[self._first[rank]]:
            self._kept[rank][self._first[rank]] = 0.0
            self._first[rank] += 1


def cap_of(
    graph: Graph, limits: Sequence[float], kept: Callable[[Action], float], put_off: Callable[[Action], float]
) -> Cap:
    """The cap of a graph: `kept` is what a forward leaves for its backward, `put_off` what of it an I leaves for its W.

    An R is counted as nothing.
    """

    def adds(action: Action) -> float:
        forward, splits = action.sibling(Pass.F), action.sibling(Pass.I) in graph.number
        late = put_off(forward) if splits else 0.0
        held = max(kept(forward), late)  # room for what waits for a W is there from the forward on
        by_kind = {Pass.F: held, Pass.B: -held, Pass.I: late - held, Pass.W: -late}
        return by_kind.get(action.kind, 0.0)

    return Cap(tuple(limits), tuple(map(adds, graph.actions)), graph)
