"""Stages, runs of parts that always execute as one, and the edges between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from helixpipe.parts.part import Part, Value


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous run of parts that always executes as one.

    `home` is the rank that owns the parameters of a stage that several ranks run (a visiting stage);
    None everywhere else, since the one rank that runs a stage owns it.
    """

    parts: tuple[Part, ...]
    home: int | None = None

    def __str__(self) -> str:
        return " ".join(map(str, self.parts))

    @property
    def has_parameters(self) -> bool:
        return any(part.about.has_parameters for part in self.parts)

    @property
    def in_any_order(self) -> bool:
        """Whether its segments hand one another nothing: shards of the vocabulary, and what joins them, have no keys."""
        return all(part.about.sharded or part.about.joins for part in self.parts)

    @property
    def reads(self) -> tuple[Value, ...]:
        """Values that come from other stages, in the order in which its parts read them."""
        made = {value for part in self.parts for value in part.makes}
        seen = dict.fromkeys(value for part in self.parts for value in part.reads)
        return tuple(value for value in seen if value not in made)


class Edge(NamedTuple):
    """Values that one stage makes and another reads. On two ranks it becomes a message, else nothing."""

    producer: int
    consumer: int
    values: tuple[Value, ...]


def edges(stages: Sequence[Stage]) -> tuple[Edge, ...]:
    """Every edge between stages, by producer then consumer; what to send is derived from these."""
    made_by = {value: s for s, stage in enumerate(stages) for part in stage.parts for value in part.makes}
    found: dict[tuple[int, int], list[Value]] = {}
    for consumer, stage in enumerate(stages):
        for value in stage.reads:
            found.setdefault((made_by[value], consumer), []).append(value)
    return tuple(Edge(producer, consumer, tuple(found[producer, consumer])) for producer, consumer in sorted(found))


def cut(parts: Iterable[Part], before: Collection[Part]) -> list[tuple[Part, ...]]:
    """The run of parts cut in front of each part of `before`."""
    pieces: list[list[Part]] = [[]]
    for part in parts:
        if part in before and pieces[-1]:
            pieces.append([])
        pieces[-1].append(part)
    return [tuple(piece) for piece in pieces]
