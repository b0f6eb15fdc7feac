"""Chunks: the pieces in which a stage is recomputed and differentiated, each about a layer.

A stage's forward keeps each chunk's inputs, and its backward holds one chunk's activations at a time. Both
the tape that does this and the prediction of its bytes cut stages here.
"""

from __future__ import annotations

from dataclasses import dataclass

from helixpipe.parts.part import Part, Value
from helixpipe.schedule.stage import Stage


@dataclass(frozen=True)
class Chunk:
    """A run of a stage's parts, the values it takes in and those it makes."""

    parts: tuple[Part, ...]
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]


def chunks(stage: Stage, whole: bool) -> tuple[Chunk, ...]:
    """No kind of part twice in one chunk, and by itself what is to be alone (the head); or one chunk for all of the stage when `whole`."""
    runs: list[list[Part]] = [[]]
    for part in stage.parts:
        full = part.about.alone or part.kind in {other.kind for other in runs[-1]}
        if full and runs[-1] and not whole:
            runs.append([])
        runs[-1].append(part)
    found = []
    for run in runs:
        makes = tuple(value for part in run for value in part.makes)
        reads = dict.fromkeys(value for part in run for value in part.reads if value not in makes)
        found.append(Chunk(tuple(run), tuple(reads), makes))
    return tuple(found)
