"""Graph: the actions of a schedule as numbers, with what each waits for and how long it takes. What orders are built on.

Times are whole numbers, of which an action takes `GRAIN` on average: sums are exact, so that every machine finds the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from helixpipe.schedule.action import Action
from helixpipe.schedule.schedule import Schedule

GRAIN = 4096


@dataclass(frozen=True)
class Graph:
    """Actions by number, rank by rank in the order of the schedule that they are of."""

    ranks: int
    actions: tuple[Action, ...]
    rank: tuple[int, ...]
    """Of each action its rank."""
    takes: tuple[int, ...]
    """Of each action its time, at least 1."""
    followers: tuple[tuple[tuple[int, int], ...], ...]
    """Of each action those that wait for it, and how long what it makes travels to each."""
    unit: float
    """What a time of 1 is, in the unit of the costs."""

    @cached_property
    def number(self) -> dict[Action, int]:
        return {action: i for i, action in enumerate(self.actions)}

    @cached_property
    def waits(self) -> tuple[int, ...]:
        """Of each action, for how many others it waits."""
        found = [0] * len(self.actions)
        for followers in self.followers:
            for follower, _ in followers:
                found[follower] += 1
        return tuple(found)

    @cached_property
    def own(self) -> tuple[tuple[int, ...], ...]:
        """Of each rank its actions."""
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for i, rank in enumerate(self.rank):
            found[rank].append(i)
        return tuple(map(tuple, found))

    def taking(self, takes: Sequence[int]) -> Graph:
        """The same actions with other times; what is known of who waits for whom is not found out anew."""
        found = replace(self, takes=tuple(takes))
        found.__dict__.update(number=self.number, waits=self.waits, own=self.own)
        return found

    def behind(self, pairs: Iterable[tuple[int, int]]) -> Graph:
        """The same where, of each pair, the second is not to be taken before the first has ended."""
        found = list(map(list, self.followers))
        for first, second in pairs:
            found[first].append((second, 0))
        return replace(self, followers=tuple(map(tuple, found)))

    @cached_property
    def backwards(self) -> Graph:
        """Time reversed: what an action waited for waits for it."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.actions]
        for i, followers in enumerate(self.followers):
            for follower, travel in followers:
                found[follower].append((i, travel))
        return Graph(self.ranks, self.actions, self.rank, self.takes, tuple(map(tuple, found)), self.unit)

    @cached_property
    def tails(self) -> tuple[int, ...]:
        """Of each action the longest chain from its start to the end of all, no rank ever busy with another."""
        found = [0] * len(self.actions)
        left = [len(followers) for followers in self.followers]
        before = self.backwards.followers
        ready = [i for i, count in enumerate(left) if not count]
        while ready:
            i = ready.pop()
            found[i] += self.takes[i]
            for j, travel in before[i]:
                found[j] = max(found[j], found[i] + travel)
                left[j] -= 1
                if not left[j]:
                    ready.append(j)
        return tuple(found)

    @cached_property
    def least(self) -> int:
        """What no order is shorter than: a rank's work between the shortest ways to it and from it, or the longest chain."""
        tails, heads = self.tails, self.backwards.tails
        found = max(tails, default=0)
        for own in filter(None, self.own):
            to, work = min(heads[i] - self.takes[i] for i in own), sum(self.takes[i] for i in own)
            found = max(found, to + work + min(tails[i] - self.takes[i] for i in own))
        return found


def graph(
    schedule: Schedule,
    costs: Callable[[Action], float],
    travel: Callable[[Action, Action], float] | None = None,
    after: Mapping[Action, Action] | None = None,
    unit: float = 0.0,
) -> Graph:
    """The graph of a schedule's actions, whatever their order. `costs`: of each action, in any unit, none below 0.

    `travel`: in the same unit, how long what one action makes is on its way to another one on another rank; free when not
    given. `after`: actions that are not to be taken before another one has ended, though they need nothing of it. `unit`: what a time of 1 is; chosen when 0.
    """
    actions = tuple(action for order in schedule.ranks for action in order)
    rank = tuple(r for r, order in enumerate(schedule.ranks) for _ in order)
    taken = list(map(costs, actions))
    unit = unit or math.fsum(taken) / (GRAIN * len(taken)) or 1.0
    followers: list[list[tuple[int, int]]] = [[] for _ in actions]
    for i, needs in enumerate(schedule.needs):
        for j in needs:
            travels = round(travel(actions[j], actions[i]) / unit) if travel and rank[j] != rank[i] else 0
            followers[j].append((i, travels))
    number = {action: i for i, action in enumerate(actions)} if after else {}
    for action, first in (after or {}).items():
        followers[number[first]].append((number[action], 0))
    takes = rounded(taken, unit)
    return Graph(len(schedule.ranks), actions, rank, takes, tuple(map(tuple, followers)), unit)


def rounded(costs: Iterable[float], unit: float) -> tuple[int, ...]:
    """Costs as times of a graph."""
    return tuple(max(1, round(each / unit)) for each in costs)
