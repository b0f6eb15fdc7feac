"""What parts keep from their forwards for their backwards, in bytes, from the shape alone: the tape, predicted.

Per layer and micro-batch, in b*s*h elements (HelixPipe, section 4.4; lse is one float32 a head and token):

    none        x n | q k v o | y n' up          12 for an MLP of 4h; the graph as it is
    selective   nothing travels   x o | q k v o
                qkv travels       x o | n o
                attention travels y | x o
    full        the same without attention's output and lse

A value kept by two stages of one rank is one tensor and counts once.

Tensor-parallel ranks divide all of it but what they gather: n and n' (in a graph, not as a stage's input), and of what an
I leaves for its W the output gradients of o and down. Each rank keeps these whole, so together they keep them tp times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from helixpipe.schedule.chunks import Chunk
from helixpipe.schedule.parts import LAYER_KINDS, Part, Value
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

    keeps_activated: bool = False
    """Whether an MLP keeps its activated tensor too, as plain autograd does: 16 and not 12. For others' runs."""
    tensor_parallel: int = 1
    """Ranks that divide the matrices. Bytes are those of all of them together."""

    @property
    def wide_bytes(self) -> int:
        """An element in float32, or wider when the run is."""
        return max(4, self.element_bytes)

    def slices(self, part: Part, batch: Batch, segment: int) -> bool:
        """Whether a part runs in slices: where a segment is longer than the part's chunk (see `model.chunked`)."""
        chunk = {"mlp": self.mlp_chunk, "head": self.head_chunk}.get(part.kind, 0)
        return 0 < chunk < batch.segment_lengths[segment]


def inside(block: Part) -> list[Part]:
    """The parts of an opaque layer, as far as bytes and seconds go."""
    return [Part(kind, block.layer) for kind in LAYER_KINDS]


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
        found |= saved(part, shape, batch, segment, keeping)
    return found


def key_values(chunk: Chunk, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
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


def owed(shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> int:
    """Bytes of gradients that later segments owe to a segment's keys and values, of one layer."""
    return 2 * batch.tokens(segment) * shape.kv_size * keeping.wide_bytes


def put_off(part: Part, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """What an I leaves for its W: input and output gradient of each linear layer; nothing where a part is chunked."""
    if part.kind == "block":
        return {k: v for p in inside(part) for k, v in put_off(p, shape, batch, segment, keeping).items()}
    if keeping.slices(part, batch, segment):
        return {}
    unit = batch.tokens(segment) * keeping.element_bytes
    linears = _linears(part, shape, keeping).items()
    return {name: unit * into for name, (_, into) in linears} | {f"d {name}": unit * out for name, (out, _) in linears}


def _linears(part: Part, shape: ModelShape, keeping: Keeping) -> dict[str, tuple[int, int]]:
    """Name of a linear layer's input -> (all its outputs, its input), elements a token."""
    q, kv, ffn = shape.q_size, shape.kv_size, shape.ffn
    h = shape.hidden * keeping.tensor_parallel  # gathered, on each rank
    match part.kind:
        case "qkv":
            return {_gathered(part.reads[0], keeping): (q + 2 * kv, h)}
        case "proj":
            return {str(part.reads[0]): (h, q)}
        case "mlp":
            ups = ffn if shape.mlp == "gelu" else 2 * ffn
            return {f"{part}.normed": (ups, h), f"{part}.act": (h, ffn)}
        case "head":
            return {f"{part}.normed": (shape.vocabulary, shape.hidden)}
        case _:
            return {}


def _gathered(value: Value, keeping: Keeping) -> str:
    """The name of a value that tensor-parallel ranks gather: another tensor than their shares of it."""
    return f"{value} gathered" if keeping.tensor_parallel > 1 else str(value)


def _bytes(value: Value, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> int:
    return math.prod(shape.value_shape(value, batch, segment)) * keeping.element_bytes


def _attention(part: Part, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    lse = batch.tokens(segment) * shape.heads * keeping.wide_bytes
    return {str(part.makes[0]): _bytes(part.makes[0], shape, batch, segment, keeping), f"lse.{part.layer}": lse}


def saved(part: Part, shape: ModelShape, batch: Batch, segment: int, keeping: Keeping) -> Kept:
    """What autograd saves of one part: the values it reads where an operation needs them, and its inside."""
    tokens = batch.tokens(segment)
    wide, narrow = keeping.wide_bytes, keeping.element_bytes
    reads = {str(value): _bytes(value, shape, batch, segment, keeping) for value in part.reads}

    def norm(name: str, size: int = shape.hidden, rows: int = 1) -> Kept:
        """`rows` of a token together have `size` elements; each has its statistics."""
        if shape.norm == "rms" and not keeping.fused_rms:
            inner = {f"{name}.scaled": tokens * size * wide, f"{name}.scale": tokens * rows * wide}
            return inner | ({f"{name}.widened": tokens * size * wide} if wide > narrow else {})
        return {f"{name}.statistics": tokens * rows * wide * (1 if shape.norm == "rms" else 2)}

    match part.kind:
        case "norm":
            return reads | norm(str(part))
        case "qkv":
            (size,) = reads.values()
            found = {_gathered(part.reads[0], keeping): size * keeping.tensor_parallel}
            if shape.qk_norm:  # over each head of q and k
                for name, wide_size, heads in (("q", shape.q_size, shape.heads), ("k", shape.kv_size, shape.kv_heads)):
                    found |= {f"{part}.{name}": tokens * wide_size * narrow} | norm(
                        f"{part}.{name}_norm", wide_size, heads
                    )
            return found
        case "attn":
            return reads | _attention(part, shape, batch, segment, keeping)
        case "proj":  # the residual add keeps nothing
            return {name: size for name, size in reads.items() if name.startswith("o.")}
        case "mlp" | "head" if keeping.slices(part, batch, segment):
            return reads
        case "mlp":
            wides = 1 if shape.mlp == "gelu" else 2
            if keeping.keeps_activated:  # and, of a gated one, what its gate became
                wides += 1 if shape.mlp == "gelu" else 2
            inner = {
                f"{part}.normed": tokens * shape.hidden * narrow * keeping.tensor_parallel,
                f"{part}.wide": wides * tokens * shape.ffn * narrow,
            }
            return reads | norm(f"{part}.norm") | inner
        case "head":
            inner = {
                f"{part}.normed": tokens * shape.hidden * narrow,
                f"{part}.logits": tokens * shape.vocabulary * wide,
            }
            return reads | norm(f"{part}.norm") | inner
        case "block":
            return {k: v for p in inside(part) for k, v in saved(p, shape, batch, segment, keeping).items()}
        case _:
            return reads
