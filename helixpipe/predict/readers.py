"""Readers: values that several stages read, and what of theirs is one tensor.

f ──┬── logits.0        one tensor, in as many messages as ranks read it
    └── logits.1        its gradients come from each, and are added up in the place of the first
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from helixpipe.parts.kind import maker
from helixpipe.parts.part import Value, vocabulary_shards
from helixpipe.schedule.program import Kind, Message, Program
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Edge

GRADIENT = "d "


def several(schedule: Schedule, makers: Iterable[int]) -> frozenset[Value]:
    """Of the values that these stages make, those that more than one stage reads."""
    readers = Counter(v for stage in makers for edge in schedule.edges_out_of[stage] for v in edge.values)
    return frozenset(value for value, count in readers.items() if count > 1)


def one_gradient(edges: Iterable[Edge]) -> dict[str, str]:
    """Gradients of what shards make that are one tensor -> the name of that of the first shard."""
    values = [value for edge in edges for value in edge.values if value.shard and maker(value.name).one_gradient]
    return {f"{GRADIENT}{value}": f"{GRADIENT}{value._replace(shard=0)}" for value in values}


def one_tensor(program: Program) -> dict[int, int]:
    """Messages that carry the same tensors away from a rank -> the number of the first of them; by number."""
    found: dict[int, int] = {}
    if not vocabulary_shards(program.schedule.parts):
        return found
    first: dict[tuple[object, ...], int] = {}
    for message in program.messages:
        if message.kind in (Kind.VALUES, Kind.GRADIENTS):
            key = message.producer, message.kind, tuple(_tensor(name, message) for name in message.names)
            found[message.number] = first.setdefault(key, message.number)
    return found


def _tensor(name: str, message: Message) -> str:
    """A name that is the same where the tensor is."""
    value, _, _ = name.partition(".")
    return value if message.kind is Kind.GRADIENTS and maker(value).one_gradient else name
