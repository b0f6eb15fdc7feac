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

from helixpipe.schedule.action import Pass
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


def _walk(program: Program, rank: int, keeping: Keeping) -> Iterator[tuple[int, int]]:
    """Live bytes of one rank, counting each tensor once however many hold it."""
    schedule, shape, batch = program.schedule, program.shape, program.batch
    cut = [chunks(stage, whole=keeping.recompute == "none") for stage in schedule.stages]
    holders: dict[tuple[int, str], int] = {}
    live = high = 0

    def hold(mb: int, held: Kept, by: int) -> None:
        nonlocal live, high
        for name, size in held.items():
            before = holders.get((mb, name), 0)
            holders[mb, name] = before + by
            live += size * ((before + by > 0) - (before > 0))
        high = max(high, live)

    for action in schedule.ranks[rank]:
        high = live
        stage, kind, mb, seg = action
        here = cut[stage] if kind is Pass.F else cut[stage][::-1]
        for chunk in here:
            mine = kept(chunk, shape, batch, seg, keeping)
            if kind is Pass.F:
                hold(mb, mine, 1)
            elif kind is Pass.B:
                again = graph(chunk, shape, batch, seg, keeping) if keeping.recompute != "none" else {}
                hold(mb, again, 1)
                hold(mb, again, -1)
                hold(mb, mine, -1)
        yield high, live


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
            wides = 2 if shape.mlp == "gelu" else 4
            inside = {
                f"{part}.normed": tokens * shape.hidden * narrow,
                f"{part}.wide": wides * tokens * shape.ffn * narrow,
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
