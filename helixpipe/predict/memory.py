"""Live bytes of each rank over its actions, each tensor counted once: what is kept (`keeping`), in the order that is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from helixpipe.parts.kind import Kept
from helixpipe.parts.work import Keeping, Work
from helixpipe.predict.keeping import kept, key_values, owed
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.chunks import Chunk, chunks
from helixpipe.schedule.program import Program


def activation_bytes(program: Program, keeping: Keeping) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank and action, in order: (the most bytes kept while it runs, bytes kept when it has ended)."""
    return tuple(tuple(_walk(program, rank, keeping)) for rank in range(len(program.ranks)))


def peak_activation_bytes(program: Program, keeping: Keeping) -> tuple[int, ...]:
    """Per rank, the most bytes that forwards keep at one time, the recomputed chunk's included."""
    return tuple(max((high for high, _ in rank), default=0) for rank in activation_bytes(program, keeping))


class Move(NamedTuple):
    """What an action takes hold of (`by` +1) or lets go of (-1)."""

    held: Kept
    by: int
    unnamed_bytes: int = 0
    """Beside tensors with names: those that one segment's action makes and another's lets go of."""


class _Live:
    """Bytes that one rank holds, each tensor counted once however many hold it."""

    def __init__(self) -> None:
        self.bytes = self.high_bytes = 0
        self._holders: dict[tuple[int, int, str], int] = {}

    def move(self, microbatch: int, segment: int, move: Move) -> None:
        """`by` more holders of each (fewer, when below 0)."""
        for name, size in move.held.items():
            key = microbatch, segment, name
            before = self._holders.get(key, 0)
            self._holders[key] = before + move.by
            self.bytes += size * ((before + move.by > 0) - (before > 0))
        self.bytes += move.unnamed_bytes * move.by
        self.high_bytes = max(self.high_bytes, self.bytes)


Moves = list[Move]
"""Those of an action, in order. The same for every micro-batch."""
_Key = tuple[int, Pass, int, bool]  # stage, pass, segment, whether an R has recomputed the last chunk

_Unit = tuple[int, int, int]  # stage, micro-batch, segment
_Highs = dict[_Key, tuple[int, int]]
"""An action -> (the most bytes more while it runs, bytes more when it has ended)."""


def _walk(program: Program, rank: int, keeping: Keeping) -> Iterator[tuple[int, int]]:
    schedule = program.schedule
    has_recompute = keeping.recomputes and any(action.kind is Pass.R for action in schedule.placed)
    order = [
        (
            action,
            (action.stage, action.kind, action.segment, has_recompute and action.sibling(Pass.R) in schedule.placed),
        )
        for action in schedule.ranks[rank]
    ]
    moves = {key: _moves(program, keeping, *key) for key in dict.fromkeys(key for _, key in order)}
    sharing = _sharing(moves)
    alone = _alone(order, moves, sharing)
    live = _Live()
    for action, key in order:
        if key[0] in sharing:
            live.high_bytes = live.bytes
            for move in moves[key]:
                live.move(action.microbatch, action.segment, move)
        else:
            high, net = alone[action.stage, action.microbatch, action.segment][key]
            live.high_bytes = live.bytes + high
            live.bytes += net
        yield live.high_bytes, live.bytes


def _sharing(moves: dict[_Key, Moves]) -> set[int]:
    """Stages that keep a tensor which another stage of this rank keeps too: counted once, so one by one."""
    stages_of: dict[str, set[int]] = {}
    for key, each in moves.items():
        for move in each:
            for name in move.held:
                stages_of.setdefault(name, set()).add(key[0])
    return {stage for stages in stages_of.values() if len(stages) > 1 for stage in stages}


def _alone(order: list[tuple[Action, _Key]], moves: dict[_Key, Moves], sharing: set[int]) -> dict[_Unit, _Highs]:
    """Of all other stages: what each action adds. It depends on what its unit did before, and on nothing else."""
    done: dict[_Unit, list[_Key]] = {}
    for action, key in order:
        if key[0] not in sharing:
            done.setdefault((action.stage, action.microbatch, action.segment), []).append(key)
    known: dict[tuple[_Key, ...], _Highs] = {}
    found: dict[_Unit, _Highs] = {}
    for unit, keys in done.items():
        whole = tuple(keys)
        if whole not in known:
            known[whole] = _highs(keys, moves)
        found[unit] = known[whole]
    return found


def _highs(keys: list[_Key], moves: dict[_Key, Moves]) -> _Highs:
    live = _Live()
    found: _Highs = {}
    for key in keys:
        before = live.high_bytes = live.bytes
        for move in moves[key]:
            live.move(0, 0, move)
        found[key] = live.high_bytes - before, live.bytes - before
    return found


def _moves(program: Program, keeping: Keeping, stage: int, kind: Pass, segment: int, ahead: bool) -> Moves:
    """`ahead`: an R of its own recomputes the last chunk."""
    schedule = program.schedule
    cut = chunks(schedule.stages[stage], whole=not keeping.recomputes)
    moves: Moves = []
    for i, chunk in enumerate(cut if kind in (Pass.F, Pass.W) else cut[::-1]):
        step = _Step(moves, chunk, Work(program.shape, program.batch, segment, keeping))
        match kind:
            case Pass.F:
                step.forward(keeps_past=schedule.segments > 1)
            case Pass.R if ahead and i == 0:
                step.recompute()
            case Pass.B | Pass.I:
                if keeping.recomputes and not (ahead and i == 0):
                    step.recompute()
                step.backward(puts_off=kind is Pass.I, kept_past=schedule.segments > 1)
            case Pass.W:
                for part in chunk.parts:
                    step.hold(step.work.put_off(part), -1)
    return moves


@dataclass(frozen=True)
class _Step:
    """One chunk of one action."""

    moves: Moves
    chunk: Chunk
    work: Work

    def hold(self, held: Kept, by: int) -> None:
        if held:
            self.moves.append(Move(held, by))

    def forward(self, keeps_past: bool) -> None:
        if not self.work.keeping.recomputes:
            self._hold_graph()
        else:
            self.hold(kept(self.chunk, self.work), 1)
        if keeps_past:
            self.hold(key_values(self.chunk, self.work), 1)

    def recompute(self) -> None:
        """What was kept gives way to the graph."""
        self._hold_graph()
        self.hold(kept(self.chunk, self.work), -1)

    def _hold_graph(self) -> None:
        for part in self.chunk.parts:
            self.hold(self.work.saved(part), 1)

    def backward(self, puts_off: bool, kept_past: bool) -> None:
        """Autograd lets go of each part's share of the graph as it passes it, but for what is put off."""
        for part in reversed(self.chunk.parts):
            left = self.work.put_off(part) if puts_off else {}
            inputs = {name: size for name, size in left.items() if not name.startswith("d ")}
            self.hold(inputs, 1)
            if part.about.attends:
                self._owe()
            self.hold(self.work.saved(part), -1)
            self.hold({name: size for name, size in left.items() if name not in inputs}, 1)
        if kept_past:
            self.hold(key_values(self.chunk, self.work), -1)

    def _owe(self) -> None:
        """The last segment's backward is the first to owe anything to those before; each takes its own."""
        segment = self.work.segment
        mine, *before = (owed(replace(self.work, segment=s)) for s in (segment, *range(segment)))
        is_last = segment == len(self.work.batch.segment_lengths) - 1
        self.moves.append(Move({}, 1, sum(before)) if is_last else Move({}, -1, mine))
