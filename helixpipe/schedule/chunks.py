"""Chunks: the pieces in which a stage is recomputed and differentiated, each about a layer.

A stage's forward keeps each chunk's inputs, and its backward holds one chunk's activations at a time. Both
the tape that does this and the prediction of its bytes cut stages here, and let values go where this says.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from helixpipe.parts.lifetimes import Lifetimes, lifetimes
from helixpipe.parts.part import Part, Value
from helixpipe.schedule.stage import Stage


@dataclass(frozen=True)
class Chunk:
    """A run of a stage's parts, the values it takes in, those it makes and those of them that it gives to others."""

    parts: tuple[Part, ...]
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]
    gives: tuple[Value, ...]
    lifetimes: Lifetimes


def chunks(stage: Stage, whole: bool, outputs: Collection[Value] | None = None) -> tuple[Chunk, ...]:
    """No kind of part twice in one chunk, and by itself what is to be alone (the head); or one chunk for all when `whole`.

    `outputs`: what others read of the stage (`Schedule.outputs`); all that nobody here reads when not given.
    """
    runs: list[list[Part]] = [[]]
    for part in stage.parts:
        full = part.about.alone or part.kind in {other.kind for other in runs[-1]}
        if full and runs[-1] and not whole:
            runs.append([])
        runs[-1].append(part)
    if outputs is None:
        read = {value for part in stage.parts for value in part.reads}
        outputs = {value for part in stage.parts for value in part.makes} - read
    found = []
    for i, run in enumerate(runs):
        makes = tuple(value for part in run for value in part.makes)
        reads = tuple(dict.fromkeys(value for part in run for value in part.reads if value not in makes))
        later = {value for other in runs[i + 1 :] for part in other for value in part.reads}
        stays = later | set(outputs)
        gives = tuple(value for value in makes if value in stays)
        found.append(Chunk(tuple(run), reads, makes, gives, lifetimes(run, stays, gives)))
    return tuple(found)
