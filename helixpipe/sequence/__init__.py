"""Attention whose sequence is spread over ranks, as plain functions on tensors.

    q, k, v = (sequence.shard(t, group) for t in (q, k, v))     # this rank's tokens, zigzag
    out = sequence.ring_attention(q, k, v, group)                 # exact, causal, differentiable
    whole = sequence.gather(out, group)

A process group is one ring. A `SequenceMesh` divides it otherwise: Ulysses, 2-D, double ring.
"""

from helixpipe.sequence.attention import ring_attention, ulysses_attention
from helixpipe.sequence.documents import Documents
from helixpipe.sequence.layout import KINDS, Layout
from helixpipe.sequence.linformer import linformer_attention
from helixpipe.sequence.mesh import SequenceMesh
from helixpipe.sequence.reorder import Shard, from_contiguous, gather, shard, shard_batch, to_contiguous

__all__ = [
    "KINDS",
    "Documents",
    "Layout",
    "SequenceMesh",
    "Shard",
    "from_contiguous",
    "gather",
    "linformer_attention",
    "ring_attention",
    "shard",
    "shard_batch",
    "to_contiguous",
    "ulysses_attention",
]
