"""When each action of a schedule would start and end if messages took no time.

    rank 0   0F0 0F1 ......... 0B0 0B1        each rank takes its actions in order; an action starts when
    rank 1   ... 1F0 1F1 1B0 1B1              its rank is free and everything it depends on has ended

`check` asks only whether this comes to an end; lowering orders the messages by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helixpipe.schedule.action import Action
from helixpipe.schedule.schedule import Schedule


@dataclass(frozen=True)
class Times:
    """Start and end of each action, and its place in one order in which all actions could run one by one."""

    start: dict[Action, float]
    end: dict[Action, float]
    place: dict[Action, int]

    @property
    def makespan(self) -> float:
        return max(self.end.values(), default=0.0)


class Stuck(Exception):
    """No rank can go on. `positions[r]` is where rank r stands."""

    def __init__(self, positions: list[int]) -> None:
        self.positions = positions


def times(schedule: Schedule, duration: Callable[[Action], float]) -> Times:
    """Run the schedule against a clock of our own; linear in the number of actions. Raises Stuck."""
    actions = [action for order in schedule.ranks for action in order]
    start, end, places = _run(schedule, list(map(duration, actions)))
    return Times(
        dict(zip(actions, start, strict=True)),
        dict(zip(actions, end, strict=True)),
        {actions[i]: place for place, i in enumerate(places)},
    )


def makespan(schedule: Schedule, duration: Callable[[Action], float]) -> float:
    """When the last action would end. Raises Stuck."""
    return max(_run(schedule, [duration(action) for order in schedule.ranks for action in order])[1], default=0.0)


def _run(schedule: Schedule, takes: Sequence[float]) -> tuple[list[float], list[float], list[int]]:
    """Start and end of each action, rank by rank, and their numbers in an order in which all could run one by one."""
    needs, ends = schedule.needs, list(itertools.accumulate(map(len, schedule.ranks)))
    at = [0, *ends[:-1]]  # of each rank the number of its next action
    begun = list(at)
    start, end = [0.0] * len(takes), [-1.0] * len(takes)
    places: list[int] = []
    clock = [0.0] * len(schedule.ranks)
    waiting: dict[int, list[int]] = {}  # action -> the ranks that stand still until it ends
    ready = list(range(len(schedule.ranks)))
    while ready:
        rank = ready.pop()
        i, now = at[rank], clock[rank]
        while i < ends[rank]:
            begin = now
            for needed in needs[i]:
                when = end[needed] if needed >= 0 else -1.0
                if when < 0:
                    waiting.setdefault(needed, []).append(rank)
                    break
                if when > begin:
                    begin = when
            else:
                start[i] = begin
                end[i] = now = begin + takes[i]
                places.append(i)
                if i in waiting:
                    ready += waiting.pop(i)
                i += 1
                continue
            break
        at[rank], clock[rank] = i, now
    if len(places) < len(takes):
        raise Stuck([i - first for i, first in zip(at, begun, strict=True)])
    return start, end, places
