"""What the parts of a model are: one file a kind, no torch. What each computes is in `model`, in a file of the same name."""

from __future__ import annotations

# each of these adds its kind to the registry
from helixpipe.parts import attn, block, embed, final, head, joined, logits, lookup, loss, mlp, norm, proj, qkv

__all__ = [
    "attn", "block", "embed", "final", "head", "joined", "logits", "lookup", "loss", "mlp", "norm", "proj", "qkv",
]  # fmt: skip
