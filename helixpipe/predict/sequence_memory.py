"""What one encoder layer holds under tensor and sequence parallelism: the published memory model.

Li et al., Sequence Parallelism: Long Sequence Training from System Perspective (arXiv 2105.13120), section 4, in
elements. N ranks, B sequences of L tokens, hidden size H = Z heads of size A, Linformer's projection to K:

    MLP        tensor     32H²/N + 4BLH/N + BLH            every rank holds the whole sequence's input
               sequence   32H²   + 5BLH/N
    attention  tensor     16AZH/N + 4BLZA/N + BZL²/N + BLH
               sequence   16AZH   + 4BZLA/N + BZL²/N + BLH/N
    Linformer  sequence   2AZH + 2BZLA/N + BZLK/N + BLH/N + 2BZKA      the projections are summed over ranks

The terms without B are parameters with their gradients and optimizer states. Embeddings, the head and what the
framework holds are not in the model. The scores' BZL² is the model's too: fused attention does not hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Encoder:
    """Sizes of one encoder layer, and how many there are."""

    layers: int
    hidden: int
    heads: int
    head_dim: int = 64


BERT_BASE = Encoder(12, 768, 12)
BERT_LARGE = Encoder(24, 1024, 16)


@dataclass(frozen=True)
class Elements:
    """What a rank holds of one layer."""

    parameters: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.activations

    def __add__(self, other: Elements) -> Elements:
        return Elements(self.parameters + other.parameters, self.activations + other.activations)


Method = Callable[[Encoder, int, int, int], Elements]
"""(encoder, batch, length, ranks) -> a layer on one rank"""


def tensor_parallel(encoder: Encoder, batch: int, length: int, ranks: int) -> Elements:
    """Heads and MLP divided, the sequence whole on every rank (Megatron without its sequence parallelism)."""
    h, z, a, n = encoder.hidden, encoder.heads, encoder.head_dim, ranks
    blh = batch * length * h
    mlp = Elements(32 * h * h / n, 4 * blh / n + blh)
    attention = Elements(16 * a * z * h / n, (4 * batch * length * z * a + batch * z * length**2) / n + blh)
    return mlp + attention


def ring_self_attention(encoder: Encoder, batch: int, length: int, ranks: int) -> Elements:
    """The sequence divided, the parameters whole on every rank."""
    h, z, a, n = encoder.hidden, encoder.heads, encoder.head_dim, ranks
    blh = batch * length * h
    attention = Elements(16 * a * z * h, (4 * batch * z * length * a + batch * z * length**2 + blh) / n)
    return _sequence_mlp(encoder, batch, length, ranks) + attention


def linformer(projection: int) -> Method:
    """Sequence parallelism with keys and values projected to `projection` tokens."""

    def method(encoder: Encoder, batch: int, length: int, ranks: int) -> Elements:
        h, z, a, n, k = encoder.hidden, encoder.heads, encoder.head_dim, ranks, projection
        divided = 2 * batch * z * length * a + batch * z * length * k + batch * length * h
        attention = Elements(2 * a * z * h, divided / n + 2 * batch * z * k * a)
        return _sequence_mlp(encoder, batch, length, ranks) + attention

    return method


def _sequence_mlp(encoder: Encoder, batch: int, length: int, ranks: int) -> Elements:
    h = encoder.hidden
    return Elements(32 * h * h, 5 * batch * length * h / ranks)


def batch_ratio(encoder: Encoder, length: int, ranks: int, tensor_ranks: int) -> float:
    """How many times the batch of tensor parallelism ring self-attention fits in the same bytes of activations."""
    one = ring_self_attention(encoder, 1, length, ranks).activations
    return tensor_parallel(encoder, 1, length, tensor_ranks).activations / one


def longest(method: Method, encoder: Encoder, batch: int, ranks: int, layer_elements: float) -> int:
    """The most tokens in a sequence of which one layer holds at most `layer_elements`; 0 when none fits."""
    low, high = 0, 1
    while method(encoder, batch, high, ranks).total <= layer_elements:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if method(encoder, batch, middle, ranks).total <= layer_elements:
            low = middle
        else:
            high = middle
    return low


def length_ratio(encoder: Encoder, batch: int, ranks: int, tensor_ranks: int, layer_elements: float) -> float:
    """How many times the length of tensor parallelism ring self-attention fits in the same elements a layer."""
    ours = longest(ring_self_attention, encoder, batch, ranks, layer_elements)
    return ours / longest(tensor_parallel, encoder, batch, tensor_ranks, layer_elements)
