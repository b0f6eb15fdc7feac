"""Program: a schedule lowered for a model shape. Per rank, actions and messages in order.

The simulator and the executor both read it: what is predicted is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from helixpipe.parts.kind import is_wide
from helixpipe.parts.work import Batch, first_alike
from helixpipe.schedule.action import Action
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from helixpipe.parts.kind import Shapes
    from helixpipe.parts.shape import ModelShape


class Kind(StrEnum):
    """What a message carries."""

    VALUES = "values"  # forward: what one stage makes and the next reads
    GRADIENTS = "gradients"  # backward: the gradients of those values
    WEIGHTS = "weights"  # from the owner to a rank where the stage visits
    WEIGHT_GRADIENTS = "weight_gradients"  # and their gradients home


@dataclass(frozen=True, eq=False, slots=True)
class Message:
    """Tensors that travel together from rank `src` to rank `dst`.

    `number` is its place in the one order that both ranks of every pair follow. `producer` and `consumer`
    are actions: the one after which it can leave, the one that waits for it; weights have no producer
    and weight gradients no consumer. `names` are values, or parameters by their full name; `shapes` theirs.
    """

    number: int
    kind: Kind
    src: int
    dst: int
    producer: Action | None
    consumer: Action | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def wide_elements(self) -> int:
        """Of values that are float32 or wider, whatever the run's precision."""
        if self.kind not in (Kind.VALUES, Kind.GRADIENTS):
            return 0
        return sum(math.prod(shape) for name, shape in zip(self.names, self.shapes, strict=True) if is_wide(name))

    def __str__(self) -> str:
        action = self.producer or self.consumer
        what = {Kind.WEIGHTS: "weights for", Kind.WEIGHT_GRADIENTS: "weight gradients of"}.get(self.kind)
        return f"{what or ' '.join(self.names) + ' of'} {action} from rank {self.src} to rank {self.dst}"


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """Execute an action, once the messages it waits for are here."""

    action: Action
    waits: tuple[Message, ...] = ()

    def __str__(self) -> str:
        return f"action {self.action}"


@dataclass(frozen=True, eq=False, slots=True)
class Send:
    """Hand a message to the transport; the rank goes on at once."""

    message: Message

    def __str__(self) -> str:
        return f"sending {self.message}"


@dataclass(frozen=True, eq=False, slots=True)
class Receive:
    """Make room for a message and start to receive it; the rank goes on at once."""

    message: Message

    def __str__(self) -> str:
        return f"starting to receive {self.message}"


@dataclass(frozen=True, eq=False, slots=True)
class Accumulate:
    """Wait for weight gradients that came home and add them to the owner's."""

    message: Message

    def __str__(self) -> str:
        return f"adding {self.message}"


Instruction = Run | Send | Receive | Accumulate


@dataclass(frozen=True, eq=False)
class Program:
    """`ranks[r]` is what rank r does, in order. `messages` are all of them, by number. `batches`: of each micro-batch its own."""

    schedule: Schedule
    shape: ModelShape
    batches: tuple[Batch, ...]
    messages: tuple[Message, ...]
    ranks: tuple[tuple[Instruction, ...], ...]

    @cached_property
    def alike(self) -> tuple[int, ...]:
        """Of each micro-batch the first one whose batch equals its own."""
        return first_alike(self.batches)

    @cached_property
    def returning(self) -> tuple[str, ...]:
        """Parameters whose gradients come home from other ranks."""
        home = [message.names for message in self.messages if message.kind is Kind.WEIGHT_GRADIENTS]
        return tuple(dict.fromkeys(name for names in home for name in names))


def leaving(instructions: Iterable[Instruction]) -> dict[Action, list[Message]]:
    """Of one rank: an action -> weight gradients that leave it right after."""
    found: dict[Action, list[Message]] = {}
    last: Action | None = None
    for instruction in instructions:
        if isinstance(instruction, Run):
            last = instruction.action
        elif isinstance(instruction, Send) and instruction.message.kind is Kind.WEIGHT_GRADIENTS:
            assert last is not None  # the action that made them, or a later one
            found.setdefault(last, []).append(instruction.message)
    return found


def parameter_owners(schedule: Schedule, shape: ModelShape) -> dict[str, int]:
    """Full name of every parameter -> the rank that owns it. A tied table belongs to the embedding's rank."""
    owners: dict[str, int] = {}
    for s, stage in enumerate(schedule.stages):
        for part in stage.parts:
            for name in shape.parameters(part):
                owners.setdefault(shape.parameter_name(part, name), schedule.owner(s))
    return owners


class Visit(NamedTuple):
    """Parameters, shapes by full name, that a rank uses in a stage and another one owns."""

    stage: int
    rank: int
    owner: int
    parameters: Shapes


def visits(schedule: Schedule, shape: ModelShape) -> list[Visit]:
    """All of them, by stage, rank and owner."""
    owners = parameter_owners(schedule, shape)
    found = []
    for s, stage in enumerate(schedule.stages):
        named = {shape.parameter_name(p, n): size for p in stage.parts for n, size in shape.parameters(p).items()}
        for rank in schedule.ranks_of[s]:
            of: dict[int, Shapes] = {}
            for name, size in named.items():
                if owners[name] != rank:
                    of.setdefault(owners[name], {})[name] = size
            found += [Visit(s, rank, owner, parameters) for owner, parameters in of.items()]
    return found
