"""Guests: weights that visit a rank, and their gradients, from action to action: what `runtime.weights` holds of them.

    weights     from the action they came for until their gradients leave; frozen ones to the step's end
    gradients   from the first action that makes them until they leave, right after an action: then they are in transit

Bytes are those of all accelerators of a rank together, each of which holds its share of what tensor parallelism divides.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping, Work
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.program import Kind, Program, Run, leaving, parameter_owners


class Guest(NamedTuple):
    """What an action has to do with weights that visit its rank."""

    came_bytes: int = 0
    """Weights that came for it."""
    made_bytes: tuple[tuple[Part, int], ...] = ()
    """Gradients of a part that it is the first to make."""
    leaves_bytes: int = 0
    """Weights and gradients that are let go, or sent home, when it has ended."""


def guests(program: Program, rank: int, keeping: Keeping, share: ModelShape) -> dict[Action, Guest]:
    """By action, where there is something. `share`: what one accelerator holds of the parameters."""
    if not any(m.kind is Kind.WEIGHTS and m.dst == rank for m in program.messages):
        return {}
    stages = program.schedule.stages
    held = share.parameter_elements(part for stage in stages for part in stage.parts)
    narrow, wide = keeping.element_bytes * keeping.processes, keeping.wide_bytes * keeping.processes
    owners, leaves = parameter_owners(program.schedule, share), leaving(program.ranks[rank])
    here: Counter[str] = Counter()  # stages that need a weight still
    made: set[str] = set()
    found: dict[Action, Guest] = {}
    for run in program.ranks[rank]:
        if not isinstance(run, Run):
            continue
        action, came, gone = run.action, 0, 0
        for message in run.waits:
            for name in message.names if message.kind is Kind.WEIGHTS else ():
                came += 0 if here[name] else held[name] * narrow
                here[name] += 1
        each: list[tuple[Part, int]] = []
        for part in stages[action.stage].parts:
            names = [n for n in _gradients(part, action, program, keeping) if owners[n] != rank and n not in made]
            made.update(names)
            each += [(part, sum(held[name] for name in names) * wide)] if names else []
        for message in leaves.get(action, ()):
            for name in message.names:
                here[name] -= 1
                gone += (0 if here[name] else held[name] * narrow) + (held[name] * wide if name in made else 0)
                made.discard(name)
        if came or each or gone:
            found[action] = Guest(came, tuple(each), gone)
    return found


def _gradients(part: Part, action: Action, program: Program, keeping: Keeping) -> list[str]:
    """Full names of a part's parameters whose gradients an action makes: an I leaves those of matrices to its W."""
    if action.kind not in BACKWARD and action.kind is not Pass.W:
        return []
    shape, split = program.shape, action.kind is not Pass.B
    if split:
        split = bool(Work(shape, program.batches[action.microbatch], action.segment, keeping).put_off(part))
    found = []
    for name, size in shape.parameters(part).items():
        late = split and len(size) > 1
        full = shape.parameter_name(part, name)
        if late == (action.kind is Pass.W) and shape.trains(full):
            found.append(full)
    return found
