"""Bytes that forwards keep for their backwards, from the shape alone: what the tape keeps, predicted.

Per layer and micro-batch, in b*s*h elements (HelixPipe, section 4.4; lse is one float32 a head and token):

    none        x n | q k v o | y n' up act      16 for an MLP of 4h; the graph as it is
    selective   nothing travels   x o | q k v o
                qkv travels       x o | n o
                attention travels y | x o
    full        the same without attention's output and lse

A value kept by two stages of one rank is one tensor and counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.chunks import Chunk, chunks
from helixpipe.schedule.parts import Part, Value
from helixpipe.schedule.program import Program
from helixpipe.shape import Batch, ModelShape

Kept = dict[str, int]  # what is kept, by a name that is the same wherever it is one tensor -> bytes


@dataclass(frozen=True)
class Keeping:
    """How a run keeps activations: policy, precision, chunked parts."""

    recompute: str = "selective"
    element_bytes: int = 4
    mlp_chunk: int = 0
    head_chunk: int = 0
    fused_rms: bool = False
    """Whether the device has a fused RMSNorm; torch's CPU one keeps the normalised input as well, in float32."""

    @property
    def wide_bytes(self) -> int:
        """An element in float32, or wider when the run is."""
        return max(4, self.element_bytes)


def kept(chunk: Chunk, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """What one chunk keeps from its forward until its backward."""
    if keeping.recompute == "none":
        return graph(chunk, shape, batch, segment, keeping)
    found = {str(value): _bytes(value, shape, batch, segment, keeping) for value in chunk.reads}
    if keeping.recompute == "selective":
        for part in chunk.parts:
            if part.kind == "attn":
                found |= _attention(part, shape, batch, segment, keeping)
    return found


def graph(chunk: Chunk, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """What autograd saves of one chunk run with a graph."""
    found: Kept = {}
    for part in chunk.parts:
        found |= _saved(part, shape, batch, segment, keeping)
    return found


def activation_bytes(program: Program, keeping: Keeping) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank and action, in order: (the most bytes kept while it runs, bytes kept when it has ended)."""
    return tuple(tuple(_walk(program, rank, keeping)) for rank in range(len(program.ranks)))


def peak_activation_bytes(program: Program, keeping: Keeping) -> tuple[int, ...]:
    """Per rank, the most bytes that forwards keep at one time, the recomputed chunk's included."""
    return tuple(max((high for high, _ in rank), default=0) for rank in activation_bytes(program, keeping))


class _Live:
    """Bytes that one rank holds, each tensor counted once however many hold it."""

    def __init__(self) -> None:
        self.bytes = self.high_bytes = 0
        self._holders: dict[tuple[int, int, str], int] = {}

    def hold(self, microbatch: int, segment: int, held: Kept, by: int) -> None:
        """`by` more holders of each (fewer, when below 0)."""
        for name, size in held.items():
            key = microbatch, segment, name
            before = self._holders.get(key, 0)
            self._holders[key] = before + by
            self.bytes += size * ((before + by > 0) - (before > 0))
        self.high_bytes = max(self.high_bytes, self.bytes)


Moves = list[tuple[Kept, int]]
"""What an action takes hold of (+1) and lets go of (-1), in order. The same for every micro-batch."""
_Key = tuple[int, Pass, int, bool]  # stage, pass, segment, whether an R has recomputed the last chunk

_Unit = tuple[int, int, int]  # stage, micro-batch, segment
_Highs = dict[_Key, tuple[int, int]]
"""An action -> (the most bytes more while it runs, bytes more when it has ended)."""


def _walk(program: Program, rank: int, keeping: Keeping) -> Iterator[tuple[int, int]]:
    schedule = program.schedule
    has_recompute = keeping.recompute != "none" and any(action.kind is Pass.R for action in schedule.placed)
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
            for held, by in moves[key]:
                live.hold(action.microbatch, action.segment, held, by)
        else:
            high, net = alone[action.stage, action.microbatch, action.segment][key]
            live.high_bytes = live.bytes + high
            live.bytes += net
        yield live.high_bytes, live.bytes


def _sharing(moves: dict[_Key, Moves]) -> set[int]:
    """Stages that keep a tensor which another stage of this rank keeps too: counted once, so one by one."""
    stages_of: dict[str, set[int]] = {}
    for key, each in moves.items():
        for held, _ in each:
            for name in held:
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
        for held, by in moves[key]:
            live.hold(0, 0, held, by)
        found[key] = live.high_bytes - before, live.bytes - before
    return found


def _moves(program: Program, keeping: Keeping, stage: int, kind: Pass, segment: int, ahead: bool) -> Moves:
    """`ahead`: an R of its own recomputes the last chunk."""
    schedule = program.schedule
    cut = chunks(schedule.stages[stage], whole=keeping.recompute == "none")
    moves: Moves = []
    for i, chunk in enumerate(cut if kind in (Pass.F, Pass.W) else cut[::-1]):
        step = _Step(moves, chunk, program.shape, program.batch, segment, keeping)
        match kind:
            case Pass.F:
                step.forward(keeps_past=schedule.segments > 1)
            case Pass.R if ahead and i == 0:
                step.recompute()
            case Pass.B | Pass.I:
                if keeping.recompute != "none" and not (ahead and i == 0):
                    step.recompute()
                step.backward(puts_off=kind is Pass.I, kept_past=schedule.segments > 1)
            case Pass.W:
                for part in chunk.parts:
                    step.hold(_put_off(part, *step.of), -1)
    return moves


@dataclass(frozen=True)
class _Step:
    """One chunk of one action."""

    moves: Moves
    chunk: Chunk
    shape: ModelShape
    batch: Batch
    segment: int
    keeping: Keeping

    def hold(self, held: Kept, by: int) -> None:
        if held:
            self.moves.append((held, by))

    @property
    def of(self) -> tuple[ModelShape, Batch, int, Keeping]:
        return self.shape, self.batch, self.segment, self.keeping

    def forward(self, keeps_past: bool) -> None:
        if self.keeping.recompute == "none":
            self._hold_graph()
        else:
            self.hold(kept(self.chunk, *self.of), 1)
        if keeps_past:
            self.hold(_key_values(self.chunk, *self.of), 1)

    def recompute(self) -> None:
        """What was kept gives way to the graph."""
        self._hold_graph()
        self.hold(kept(self.chunk, *self.of), -1)

    def _hold_graph(self) -> None:
        for part in self.chunk.parts:
            self.hold(_saved(part, *self.of), 1)

    def backward(self, puts_off: bool, kept_past: bool) -> None:
        """Autograd lets go of each part's share of the graph as it passes it, but for what is put off."""
        for part in reversed(self.chunk.parts):
            left = _put_off(part, *self.of) if puts_off else {}
            inputs = {name: size for name, size in left.items() if not name.startswith("d ")}
            self.hold(inputs, 1)
            self.hold(_saved(part, *self.of), -1)
            self.hold({name: size for name, size in left.items() if name not in inputs}, 1)
        if kept_past:
            self.hold(_key_values(self.chunk, *self.of), -1)


def _key_values(chunk: Chunk, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """Keys and values that later segments read: there until the segment's own backward.

    Where a recompute makes them anew, those of the forward stay beside the recomputed ones.
    """
    values = [value for part in chunk.parts if part.kind == "attn" for value in part.reads[1:]]
    twice = keeping.recompute != "none"
    return {
        f"{value} of the forward" if twice and value not in chunk.reads else str(value): _bytes(
            value, shape, batch, segment, keeping
        )
        for value in values
    }


def _put_off(part: Part, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """What an I leaves for its W: input and output gradient of each linear layer; nothing where a part is chunked."""
    if (part.kind == "mlp" and keeping.mlp_chunk) or (part.kind == "head" and keeping.head_chunk):
        return {}
    unit = batch.tokens(segment) * keeping.element_bytes
    linears = _linears(part, shape).items()
    return {name: unit * into for name, (_, into) in linears} | {f"d {name}": unit * out for name, (out, _) in linears}


def _linears(part: Part, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Name of a linear layer's input -> (all its outputs, its input), elements a token."""
    h, q, kv, ffn = shape.hidden, shape.q_size, shape.kv_size, shape.ffn
    match part.kind:
        case "qkv":
            return {str(part.reads[0]): (q + 2 * kv, h)}
        case "proj":
            return {str(part.reads[0]): (h, q)}
        case "mlp":
            ups = ffn if shape.mlp == "gelu" else 2 * ffn
            return {f"{part}.normed": (ups, h), f"{part}.act": (h, ffn)}
        case "head":
            return {f"{part}.normed": (shape.vocabulary, h)}
        case _:
            return {}


def _bytes(value: Value, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> int:
    return math.prod(shape.value_shape(value, batch, segment)) * keeping.element_bytes


def _attention(part: Part, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    lse = batch.tokens(segment) * shape.heads * keeping.wide_bytes
    return {str(part.makes[0]): _bytes(part.makes[0], shape, batch, segment, keeping), f"lse.{part.layer}": lse}


def _saved(part: Part, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """What autograd saves of one part: the values it reads where an operation needs them, and its inside."""
    tokens = batch.tokens(segment)
    wide, narrow = keeping.wide_bytes, keeping.element_bytes
    reads = {str(value): _bytes(value, shape, batch, segment, keeping) for value in part.reads}

    def norm(name: str, size: int = shape.hidden) -> Kept:
        if shape.norm == "rms" and not keeping.fused_rms:
            inside = {f"{name}.scaled": tokens * size * wide, f"{name}.scale": tokens * wide}
            return inside | ({f"{name}.widened": tokens * size * wide} if wide > narrow else {})
        return {f"{name}.statistics": tokens * wide * (1 if shape.norm == "rms" else 2)}

    match part.kind:
        case "norm":
            return reads | norm(str(part))
        case "attn":
            return reads | _attention(part, shape, batch, segment, keeping)
        case "proj":  # the residual add keeps nothing
            return {name: size for name, size in reads.items() if name.startswith("o.")}
        case "mlp" if keeping.mlp_chunk:
            return reads
        case "mlp":
            wides = 1 if shape.mlp == "gelu" else 3
            inside = {
                f"{part}.normed": tokens * shape.hidden * narrow,
                f"{part}.wide": wides * tokens * shape.ffn * narrow,
                f"{part}.act": tokens * shape.ffn * narrow,
            }
            return reads | norm(f"{part}.norm") | inside
        case "head" if keeping.head_chunk:
            return reads
        case "head":
            inside = {
                f"{part}.normed": tokens * shape.hidden * narrow,
                f"{part}.logits": tokens * shape.vocabulary * wide,
            }
            return reads | norm(f"{part}.norm") | inside
        case "block":
            inner = [Part(kind, part.layer) for kind in ("norm", "qkv", "attn", "proj", "mlp")]
            return {k: v for p in inner for k, v in _saved(p, shape, batch, segment, keeping).items()}
        case _:
            return reads
