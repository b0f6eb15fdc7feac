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

from helixpipe.parts.kind import Kept
from helixpipe.parts.part import Part
from helixpipe.parts.work import Work
from helixpipe.schedule.chunks import Chunk


def kept(chunk: Chunk, work: Work) -> Kept:
    """What one chunk keeps from its forward until its backward."""
    if not work.keeping.recomputes or chunk.graphed:
        return graph(chunk, work)
    found = work.values(chunk.reads)
    if work.keeping.recompute == "selective":
        for part in chunk.parts:
            found |= work.kept(part)
    return found


def graph(chunk: Chunk, work: Work) -> Kept:
    """What autograd saves of one chunk run with a graph."""
    found: Kept = {}
    for part in chunk.parts:
        found |= work.saved(part)
    return found


def key_values(part: Part, chunk: Chunk, work: Work) -> Kept:
    """Keys and values of a part that later segments read: there until the segment's own backward.

    Where a recompute makes them anew, those of the forward stay beside the recomputed ones: the last of them, with a
    window, as many as later segments see.
    """
    values = part.reads[1:] if part.about.attends else ()
    tokens, found = _tail(part, work), {}
    for value in values:
        apart = work.keeping.recomputes and (value not in chunk.reads or tokens < work.length)
        nbytes = work.value_bytes(value)
        found[f"{value} of the forward" if apart else str(value)] = nbytes * tokens // work.length if apart else nbytes
    return found


def owed(part: Part, work: Work) -> int:
    """Bytes of gradients that later segments owe to a segment's keys and values, of one layer."""
    tokens = work.batch.microbatch_size * _tail(part, work)
    return 2 * tokens * work.shape.kv_size * work.keeping.wide_bytes


def _tail(part: Part, work: Work) -> int:
    """Tokens of a segment that later ones see; around a ring all ranks keep as many."""
    keeping = work.keeping
    context = keeping.processes // keeping.tensor_parallel
    return min(work.batch.tail(work.segment, work.shape.window_of(part.layer)) * context, work.length)
