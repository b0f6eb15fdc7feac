"""Live bytes of each rank over its actions, each tensor counted once: what is held, in the order that is run.

It follows the tape (`runtime.tape`) and the mailbox (`runtime.stages`) move by move: values from their maker to their last
reader, what a graph saves, what a policy keeps, gradients that wait, and what each part needs while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from helixpipe.parts.kind import Kept
from helixpipe.parts.part import Part, Value
from helixpipe.parts.shape import ModelShape, handed_on
from helixpipe.parts.work import Keeping, Work
from helixpipe.predict.guests import Guest, guests
from helixpipe.predict.keeping import kept, key_values, owed
from helixpipe.predict.readers import GRADIENT, one_gradient, several
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.chunks import Chunk, chunks
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Edge


class Held(NamedTuple):
    """Bytes of one action: at its fullest moment, kept and workspace; and kept when it has ended."""

    kept_bytes: int
    workspace_bytes: int
    left_bytes: int


def held_bytes(program: Program, keeping: Keeping, share: ModelShape | None = None) -> tuple[tuple[Held, ...], ...]:
    """Per rank, of each action in order. `share`: what one accelerator holds of the parameters, where tp says it not all."""
    share = program.shape.tensor_share(keeping.tensor_parallel) if share is None else share
    works = {
        (mb, segment): Work(program.shape, program.batches[mb], segment, keeping)
        for mb in dict.fromkeys(program.alike)
        for segment in range(program.schedule.segments)
    }
    return tuple(tuple(_walk(program, rank, keeping, works, share)) for rank in range(len(program.ranks)))


def peak_activation_bytes(program: Program, keeping: Keeping) -> tuple[int, ...]:
    """Per rank, the most bytes that are kept or worked with at one time."""
    return tuple(
        max((held.kept_bytes + held.workspace_bytes for held in rank), default=0)
        for rank in held_bytes(program, keeping)
    )


class Move(NamedTuple):
    """What an action takes hold of (`by` +1) or lets go of (-1), or needs for a moment."""

    held: Kept
    by: int
    unnamed_bytes: int = 0
    """Beside tensors with names: those that one action makes or takes in and another lets go of."""
    workspace_bytes: int = 0


class Meets(NamedTuple):
    """Of each edge into a stage, and out of it, whether its other end is on the same rank."""

    before: tuple[bool, ...]
    after: tuple[bool, ...]


class _Live:
    """Bytes that one rank holds, each tensor counted once however many hold it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.high = 0, 0
        """Kept and workspace where their sum is most, since `begin`."""
        self._holders: dict[tuple[int, int, str], int] = {}

    def begin(self) -> None:
        self.high = self.bytes, 0

    def move(self, microbatch: int, segment: int, move: Move) -> None:
        """`by` more holders of each (fewer, when below 0)."""
        for name, size in move.held.items():
            key = microbatch, segment, name
            before = self._holders.get(key, 0)
            self._holders[key] = before + move.by
            self.bytes += size * ((before + move.by > 0) - (before > 0))
        self.bytes += move.unnamed_bytes * move.by
        if self.bytes + move.workspace_bytes > sum(self.high):
            self.high = self.bytes, move.workspace_bytes


Moves = list[Move]
"""Those of an action, in order. The same for every micro-batch like it that meets the same stages on its rank."""
# stage, pass, the first micro-batch that is alike, segment, whether an R has recomputed the last chunk, neighbours, weights
# that visit
_Key = tuple[int, Pass, int, int, bool, Meets, Guest]
_Unit = tuple[int, int, int]  # stage, micro-batch, segment
_Works = dict[tuple[int, int], Work]  # micro-batch, segment
_Highs = dict[_Key, tuple[int, int, int]]
"""An action -> (kept and workspace at most, kept when it has ended), beyond what was held before."""


def _walk(program: Program, rank: int, keeping: Keeping, works: _Works, share: ModelShape) -> Iterator[Held]:
    schedule, visiting = program.schedule, guests(program, rank, keeping, share)
    has_recompute = keeping.recomputes and any(action.kind is Pass.R for action in schedule.placed)
    meets: dict[tuple[int, int], Meets] = {}
    order: list[tuple[Action, _Key]] = []
    for action in schedule.ranks[rank]:
        stage, kind, mb, segment = action
        if (stage, mb) not in meets:
            meets[stage, mb] = _meets(schedule, rank, stage, mb)
        ahead = has_recompute and action.sibling(Pass.R) in schedule.placed
        guest = visiting.get(action, NOBODY)
        order.append((action, (stage, kind, program.alike[mb], segment, ahead, meets[stage, mb], guest)))
    moves: dict[_Key, Moves] = {}
    for key in dict.fromkeys(key for _, key in order):
        stage, kind, mb, segment, ahead, met, guest = key
        moves[key] = _moves(schedule, works[mb, segment], stage, kind, ahead, met, guest)
    sharing = _sharing(moves)
    alone = _alone(order, moves, sharing)
    live = _Live()
    for action, key in order:
        if key[0] in sharing:
            live.begin()
            for move in moves[key]:
                live.move(action.microbatch, action.segment, move)
            yield Held(*live.high, live.bytes)
        else:
            high, workspace, net = alone[action.stage, action.microbatch, action.segment][key]
            live.bytes += net
            yield Held(live.bytes - net + high, workspace, live.bytes)


def _meets(schedule: Schedule, rank: int, stage: int, microbatch: int) -> Meets:
    before = tuple(schedule.placement[edge.producer, microbatch] == rank for edge in schedule.edges_into[stage])
    after = tuple(schedule.placement[edge.consumer, microbatch] == rank for edge in schedule.edges_out_of[stage])
    return Meets(before, after)


def _sharing(moves: dict[_Key, Moves]) -> set[int]:
    """Stages that hold a tensor which another stage of this rank holds too: counted once, so one by one."""
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
        before = live.bytes
        live.begin()
        for move in moves[key]:
            live.move(0, 0, move)
        found[key] = live.high[0] - before, live.high[1], live.bytes - before
    return found


def _moves(schedule: Schedule, work: Work, stage: int, kind: Pass, ahead: bool, meets: Meets, guest: Guest) -> Moves:
    """`ahead`: an R of its own recomputes the last chunk. `meets`: which neighbours are on the same rank."""
    keeping = work.keeping
    cut = chunks(schedule.stages[stage], not keeping.recomputes, schedule.outputs[stage])
    into, out = schedule.edges_into[stage], schedule.edges_out_of[stage]
    # what another rank's part handed on came as a tensor of its own
    here = [stage, *(edge.producer for edge, met in zip(into, meets.before, strict=True) if met)]
    same = handed_on((part for each in here for part in schedule.stages[each].parts), work.shape)
    same |= one_gradient((*into, *out))
    shared = several(schedule, (stage, *(edge.producer for edge in into)))
    step = _Step([], work, schedule.segments > 1, same, dict(guest.made_bytes), shared)
    step.visits(guest.came_bytes, 1)
    if kind is Pass.F:
        step.arrive(into, meets.before)
        for chunk in cut:
            step.forward(chunk)
        step.leave(schedule.outputs[stage], out, meets.after)
    elif kind is Pass.R:
        if ahead:
            step.recompute(cut[-1])
    elif kind is Pass.W:
        for part in schedule.stages[stage].parts:
            step.visits(step.made_bytes.get(part, 0), 1)
            step.hold(work.put_off(part), -1)
    else:
        step.add_up(out, meets.after)
        waiting = {value for edge in out for value in edge.values}  # whose gradients are there
        for i, chunk in enumerate(reversed(cut)):
            if keeping.recomputes and not (ahead and i == 0):
                step.recompute(chunk)
            step.backward(chunk, kind is Pass.I, waiting)
        step.leave((v for edge in into for v in edge.values), into, meets.before, GRADIENT)
    step.visits(guest.leaves_bytes, -1)
    return step.moves


NOBODY = Guest()


@dataclass(frozen=True)
class _Step:
    """One action, as the tape and the mailbox carry it out."""

    moves: Moves
    work: Work
    keeps_past: bool
    """Whether keys and values wait for later segments."""
    same: dict[str, str]
    """Names of values that are other values' tensors here -> theirs."""
    made_bytes: dict[Part, int]
    """Gradients of visiting weights that are first made here."""
    several: frozenset[Value]
    """Values that more than one stage reads."""

    def hold(self, held: Kept, by: int) -> None:
        alone = {name: size for name, size in held.items() if name not in self.same} if self.same else held
        if alone:
            self.moves.append(Move(alone, by))
        for name in self.same.keys() & held.keys():  # by itself: it may be held under both names at once
            self.moves.append(Move({self.same[name]: held[name]}, by))

    def needs(self, workspace_bytes: int) -> None:
        self.moves.append(Move({}, 0, 0, workspace_bytes))

    def visits(self, nbytes: int, by: int) -> None:
        if nbytes:
            self.moves.append(Move({}, by, nbytes))

    def values(self, values: Iterable[Value], by: int, prefix: str = "") -> None:
        self.hold({f"{prefix}{name}": size for name, size in self.work.values(values).items()}, by)

    def arrive(self, edges: Sequence[Edge], meets: Sequence[bool]) -> None:
        """What messages brought; what another stage of this rank made is there already."""
        for edge, met in zip(edges, meets, strict=True):
            if not met:
                self.values(edge.values, 1)

    def add_up(self, edges: Sequence[Edge], meets: Sequence[bool]) -> None:
        """Gradients of what was made, from each of its readers; those of one value are added up."""
        readers = [(value, edge, met) for edge, met in zip(edges, meets, strict=True) for value in edge.values]
        came = [value for value, _, met in readers if not met]
        if self.several:
            self.needs(sum(self.work.value_bytes(value) for value in came if value in self.several))
        self.values((value for value, *_ in readers if value in self.several or value in came), 1, GRADIENT)
        for value, edge, met in readers:
            if met and value in self.several:
                self.hold({self._waiting(value, edge): self.work.value_bytes(value)}, -1)

    @staticmethod
    def _waiting(value: Value, edge: Edge) -> str:
        """The name of a gradient that waits for those of other readers."""
        return f"{GRADIENT}{value} of {edge.consumer}"

    def leave(self, values: Iterable[Value], edges: Sequence[Edge], meets: Sequence[bool], prefix: str = "") -> None:
        """What is made waits for each stage of this rank that reads it; the rest is in transit from here on."""
        for edge, met in zip(edges, meets, strict=True):
            if met:
                apart = [v for v in edge.values if prefix and v in self.several]
                self.values((v for v in edge.values if v not in apart), 1, prefix)
                self.hold({self._waiting(v, edge): self.work.value_bytes(v) for v in apart}, 1)
        self.values(values, -1, prefix)

    def forward(self, chunk: Chunk) -> None:
        graph = not self.work.keeping.recomputes or chunk.graphed
        if not graph:
            self.values(chunk.reads, 1)
        self._run(chunk, graph, again=False)

    def recompute(self, chunk: Chunk) -> None:
        """What was kept gives way to the graph, where there is none yet."""
        if chunk.graphed:
            return
        self._run(chunk, graph=True, again=True)
        self.values(chunk.gives if not self._is_unread(chunk) else chunk.gives[:-1], -1)
        self.hold(kept(chunk, self.work), -1)

    def _run(self, chunk: Chunk, graph: bool, again: bool) -> None:
        work = self.work
        selective = work.keeping.recompute == "selective"
        for place, (part, drops) in enumerate(zip(chunk.parts, chunk.lifetimes.drops, strict=True)):
            if not (again and part is chunk.parts[-1] and self._is_unread(chunk)):
                self.values(part.makes, 1)
            if graph:
                self.hold(chunk.saved(place, work), 1)
            elif selective:
                self.hold(work.kept(part), 1)
            if not (again and selective and part.about.attends):  # which is replayed, and attends to nothing
                self.needs(work.forward_workspace(part, graph))
            if self.keeps_past and not again:
                self.hold(key_values(part, chunk, work), 1)
            self.values((v for v in drops if not again or v not in chunk.reads), -1)

    def _is_unread(self, chunk: Chunk) -> bool:
        """Whether a recompute leaves out what the chunk ends in."""
        return self.work.slices(chunk.parts[-1])

    def backward(self, chunk: Chunk, puts_off: bool, waiting: set[Value]) -> None:
        """Autograd lets go of each part's share of the graph as it passes it, but for what is put off.

        Gradients of what it reads are added to those that are `waiting`, of others who read it.
        """
        work = self.work
        self.values(chunk.gives, -1, GRADIENT)
        waiting.difference_update(chunk.gives)
        for place, part in reversed(list(enumerate(chunk.parts))):
            left = work.put_off(part) if puts_off else {}
            inputs = {name: size for name, size in left.items() if not name.startswith(GRADIENT)}
            self.needs(chunk.backward_bytes(place, work))
            self.hold(inputs, 1)
            if part.about.attends:
                self._owe(part)
            self.hold(chunk.saved(place, work), -1)
            self.visits(self.made_bytes.get(part, 0), 1)
            self.hold({name: size for name, size in left.items() if name not in inputs}, 1)
        self.values((value for value in chunk.reads if value not in waiting), 1, GRADIENT)
        waiting.update(chunk.reads)
        for part in chunk.parts if self.keeps_past else ():
            self.hold(key_values(part, chunk, work), -1)

    def _owe(self, part: Part) -> None:
        """The last segment that sees an earlier one is the first whose backward owes it anything; each takes its own."""
        work, segment = self.work, self.work.segment
        batch, window = work.batch, work.shape.window_of(part.layer)
        is_last = segment + 1 == len(batch.segment_lengths)
        after = range(segment, segment) if is_last else batch.seen(segment + 1, window)
        first = [s for s in batch.seen(segment, window) if s not in after]
        for segments, by in ((first, 1), ([segment] if segment in after else [], -1)):
            if segments:
                self.moves.append(Move({}, by, sum(owed(part, replace(work, segment=s)) for s in segments)))
