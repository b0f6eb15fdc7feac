"""Chunks: the pieces in which a stage is recomputed and differentiated, each about a layer.

A stage's forward keeps each chunk's inputs, and its backward holds one chunk's activations at a time. Both
the tape that does this and the prediction of its bytes cut stages here, and let values go where this says.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from helixpipe.parts.kind import Kept
from helixpipe.parts.lifetimes import Lifetimes, lifetimes
from helixpipe.parts.part import Part, Value
from helixpipe.parts.work import Work
from helixpipe.schedule.stage import Stage


@dataclass(frozen=True)
class Chunk:
    """A run of a stage's parts, the values it takes in, those it makes and those of them that it gives to others."""

    parts: tuple[Part, ...]
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]
    gives: tuple[Value, ...]
    lifetimes: Lifetimes

    @property
    def graphed(self) -> bool:
        """Whether its graph is kept under every policy."""
        return all(part.about.graphed for part in self.parts)

    def made_again(self, place: int) -> tuple[Value, ...]:
        """What a part's recomputed graph does not keep: it is made again in the part's backward, which is not the first."""
        if place == len(self.parts) - 1:
            return ()
        cheap = {value for part in self.parts if part.about.cheap for value in part.makes}
        return tuple(value for value in self.lifetimes.own[place] if value in cheap)

    def in_place(self, place: int) -> bool:
        """Whether a recomputed part's gradients may take the places of what it reads: nobody else has it."""
        reads = self.parts[place].reads
        return self.parts[place].about.attends and self.lifetimes.own[place] == reads

    def saved(self, place: int, work: Work) -> Kept:
        """What autograd saves of a part."""
        again = set(map(str, self._made_again(place, work)))
        return {name: size for name, size in work.saved(self.parts[place]).items() if name not in again}

    def _made_again(self, place: int, work: Work) -> tuple[Value, ...]:
        """Of this model and keeping: what a layer without a norm hands on is kept."""
        if not work.keeping.is_lean:
            return ()
        cheap = {value for part in self.parts if work.shape.about(part).cheap for value in part.makes}
        return tuple(value for value in self.made_again(place) if value in cheap)

    def backward_bytes(self, place: int, work: Work) -> int:
        """Workspace of a part's backward, and the gradients that wait in the chunk when it begins."""
        part = self.parts[place]
        pending = sum(map(work.value_bytes, self.lifetimes.pending[place]))
        unread = work.keeping.recomputes and part is self.parts[-1] and not self.graphed
        found = pending + work.backward_workspace(part, unread)
        if work.keeping.is_lean:
            saved = work.saved(part)
            found += sum(saved.get(str(value), 0) for value in self._made_again(place, work))
            found -= work.in_place(part) if self.in_place(place) else 0
        return found


def chunks(stage: Stage, whole: bool, outputs: Collection[Value] | None = None) -> tuple[Chunk, ...]:
    """No kind of part twice in one chunk, and by itself what is to be alone (the head); or one chunk for all when `whole`.

    `outputs`: what others read of the stage (`Schedule.outputs`); all that nobody here reads when not given.
    """
    return _chunks(stage.parts, whole, None if outputs is None else frozenset(outputs))


@lru_cache(maxsize=1024)  # a plan prices a schedule's stages rank by rank, and under several policies
def _chunks(parts: tuple[Part, ...], whole: bool, outputs: frozenset[Value] | None) -> tuple[Chunk, ...]:
    runs: list[list[Part]] = [[]]
    for part in parts:
        full = part.about.alone or any(other.about.alone or other.kind == part.kind for other in runs[-1])
        if full and runs[-1] and not whole:
            runs.append([])
        runs[-1].append(part)
    if outputs is None:
        read = {value for part in parts for value in part.reads}
        outputs = frozenset(value for part in parts for value in part.makes) - read
    found = []
    for i, run in enumerate(runs):
        makes = tuple(value for part in run for value in part.makes)
        reads = tuple(dict.fromkeys(value for part in run for value in part.reads if value not in makes))
        later = {value for other in runs[i + 1 :] for part in other for value in part.reads}
        stays = later | outputs
        gives = tuple(value for value in makes if value in stays)
        found.append(Chunk(tuple(run), reads, makes, gives, lifetimes(run, stays, gives)))
    return tuple(found)
