"""When each action of a schedule would start and end if messages took no time.

    rank 0   0F0 0F1 ......... 0B0 0B1        each rank takes its actions in order; an action starts when
    rank 1   ... 1F0 1F1 1B0 1B1              its rank is free and everything it depends on has ended

`check` asks only whether this comes to an end; lowering orders the messages by it.
"""

from __future__ import annotations

from collections.abc import Callable
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
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    place: dict[Action, int] = {}
    dependencies = schedule.dependencies
    positions = [0] * len(schedule.ranks)
    clock = [0.0] * len(schedule.ranks)
    waiting: dict[Action, list[int]] = {}  # action -> the ranks that stand still until it ends
    ready = list(range(len(schedule.ranks)))
    while ready:
        rank = ready.pop()
        order = schedule.ranks[rank]
        while positions[rank] < len(order):
            action = order[positions[rank]]
            begin = clock[rank]
            for needed in dependencies(action):
                if needed not in end:
                    waiting.setdefault(needed, []).append(rank)
                    break
                begin = max(begin, end[needed])
            else:
                start[action], place[action] = begin, len(place)
                clock[rank] = end[action] = begin + duration(action)
                positions[rank] += 1
                ready += waiting.pop(action, ())
                continue
            break
    if any(at < len(order) for at, order in zip(positions, schedule.ranks, strict=True)):
        raise Stuck(positions)
    return Times(start, end, place)
