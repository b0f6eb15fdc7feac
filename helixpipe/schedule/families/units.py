"""What the families share: the units that a rank works through, and how forwards and backwards take turns.

A unit is a segment of a micro-batch (a whole micro-batch when it has one segment). Forwards take them in
order; backwards take micro-batches in order and each one's segments from the last, whose keys and values
no other segment needs, to the first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.partition import refuse_opaque

Unit = tuple[int, int]  # micro-batch, segment
T = TypeVar("T")


def forward_units(microbatches: Iterable[int], segments: int) -> list[Unit]:
    return [(mb, seg) for mb in microbatches for seg in range(segments)]


def backward_units(microbatches: Iterable[int], segments: int) -> list[Unit]:
    return [(mb, seg) for mb in microbatches for seg in reversed(range(segments))]


def take_turns(forwards: Sequence[T], backwards: Sequence[T], ahead: int) -> Iterator[T]:
    """`ahead` forwards, then one forward, one backward, until the forwards are done; then the other backwards."""
    ahead = min(ahead, len(forwards))
    yield from forwards[:ahead]
    for i, backward in enumerate(backwards):
        if ahead + i < len(forwards):
            yield forwards[ahead + i]
        yield backward


def split_backwards(order: Iterable[Action], late: int) -> Iterator[Action]:
    """The order with each I's W: after the I that comes `late` I's later, and what is left at the end."""
    waiting: deque[Action] = deque()
    for action in order:
        yield action
        if action.kind is Pass.I:
            waiting.append(action.sibling(Pass.W))
            if len(waiting) > late:
                yield waiting.popleft()
    yield from waiting


def check_segments(segments: int, opaque: Collection[int] = ()) -> None:
    """Whether layers can be run in so many segments; raises ConfigError."""
    if segments < 1:
        raise ConfigError(f"schedule.segments: {segments}; give at least 1 (1 keeps the sequence whole)")
    refuse_opaque(segments, opaque)
