"""The parts of a decoder as torch modules. b sequences, s tokens, h hidden size; `start` says where the tokens are.

embed(tokens, start) -> x      norm(x) -> n             qkv(n, start) -> q, k, v    attn(q, k, v) -> o
proj(o, x) -> y                mlp(y) -> x'             head(x, targets) -> summed loss
block(x, start) -> x'          a whole layer, where it cannot be split
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.attention import Attention
from helixpipe.model.chunked import chunked, chunked_sum, shard_chunk
from helixpipe.model.linear import Linear, activated, same
from helixpipe.shape import ModelShape

IGNORED = -100
"""A target that counts for nothing, as in torch's cross entropy."""
Start = int | Tensor
"""The first position of contiguous tokens; where ranks share a sequence, every token's position, int64 [s]."""
# tokens of rotary tables that are kept, in longest sequences: a few ways to cut one stay, ever new lengths do not
KEPT_SEQUENCES = 8


def norm(shape: ModelShape, size: int | None = None) -> nn.Module:
    """RMSNorm or LayerNorm over the last dimension."""
    kind = nn.RMSNorm if shape.norm == "rms" else nn.LayerNorm
    return kind(size or shape.hidden, eps=shape.norm_eps)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Rope:
    """Rotary positions (arXiv 2104.09864), halves rotated as in Llama. Tables are made on demand and shared."""

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        self.tables: dict[tuple[Start, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._tokens = self._longest = 0

    def table(self, start: Start, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [s, 1, d/2], from angles in float64 so that far positions stay exact."""
        key = start, length, device, dtype  # a tensor is a key by its identity: runs make theirs once
        if key not in self.tables:
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
            positions = start if isinstance(start, Tensor) else torch.arange(start, start + length, device=device)
            angles = torch.outer(positions.double(), self.base**-steps).unsqueeze(1)
            self._make_room(len(positions), int(positions[-1]) + 1)
            self.tables[key] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self.tables[key]

    def _make_room(self, tokens: int, end: int) -> None:
        """For one more table: all others go when there are too many for the longest sequence so far."""
        self._longest = max(self._longest, end)
        if self._tokens + tokens > KEPT_SEQUENCES * self._longest:
            self.tables.clear()
            self._tokens = 0
        self._tokens += tokens

    def __call__(self, x: Tensor, start: Start) -> Tensor:
        """Rotate x [b, s, heads, d]."""
        cos, sin = self.table(start, x.shape[1], x.device, x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Embed(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.context, shape.hidden) if shape.positions == "learned" else None

    def forward(self, tokens: Tensor, start: Start) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.positions is None:
            return x
        if isinstance(start, Tensor):
            return x + self.positions(start)  # type: ignore[no-any-return]
        return x + self.positions.weight[start : start + tokens.shape[1]]


class QKV(nn.Module):
    gather: Callable[[Tensor], Tensor] = staticmethod(same)
    """From this rank's tokens to those of all ranks that divide the heads."""

    def __init__(self, shape: ModelShape, rope: Rope | None) -> None:
        super().__init__()
        self.q = Linear(shape.hidden, shape.q_size, bias=shape.qkv_bias)
        self.k = Linear(shape.hidden, shape.kv_size, bias=shape.qkv_bias)
        self.v = Linear(shape.hidden, shape.kv_size, bias=shape.qkv_bias)
        self.q_norm = norm(shape, shape.head_dim) if shape.qk_norm else None
        self.k_norm = norm(shape, shape.head_dim) if shape.qk_norm else None
        self.rope, self.head_dim = rope, shape.head_dim

    def forward(self, n: Tensor, start: Start) -> tuple[Tensor, Tensor, Tensor]:
        n = self.gather(n)
        q, k, v = (linear(n).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, start), self.rope(k, start)
        return q, k, v


class Proj(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.o = Linear(shape.q_size, shape.hidden, bias=shape.bias)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        return x + self.o(o)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Norm, GELU or SwiGLU MLP and residual add; over slices of `chunk` tokens when that is not 0."""

    shards: int = 1
    """Ranks that share a sequence (cp x tp); `chunk` is of the whole of it."""
    gather: Callable[[Tensor], Tensor] = staticmethod(same)
    """From this rank's tokens to those of all ranks that divide `ffn`."""

    def __init__(self, shape: ModelShape, chunk: int = 0) -> None:
        super().__init__()
        self.norm = norm(shape)
        self.gate = Linear(shape.hidden, shape.ffn, bias=shape.bias) if shape.mlp == "swiglu" else None
        self.up = Linear(shape.hidden, shape.ffn, bias=shape.bias)
        self.down = Linear(shape.ffn, shape.hidden, bias=shape.bias)
        self.chunk = chunk

    def forward(self, y: Tensor) -> Tensor:
        return chunked(self, shard_chunk(self.chunk, self.shards), y)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        n = self.gather(self.norm(x))
        if self.gate is None:
            return x + activated(self.down, F.gelu, self.up(n))
        return x + activated(self.down, _swiglu, self.gate(n), self.up(n))


class Head(nn.Module):
    """Final norm, logits and cross entropy, summed over tokens; over slices of `chunk` tokens when that is not 0."""

    shards: int = 1
    """As the MLP's."""

    def __init__(self, shape: ModelShape, chunk: int = 0) -> None:
        super().__init__()
        self.norm = norm(shape)
        self.output = Linear(shape.hidden, shape.vocabulary, bias=False)
        self.chunk = chunk

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return chunked_sum(self, shard_chunk(self.chunk, self.shards), x, targets)

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        (targets,) = others
        logits = self.output(self.norm(x)).flatten(0, 1)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")


class Block(nn.Module):
    """A whole layer as one part: what an unsplittable layer looks like to the rest."""

    def __init__(self, norm: nn.Module, qkv: QKV, attn: Attention, proj: Proj, mlp: MLP) -> None:
        super().__init__()
        self.norm, self.qkv, self.attn, self.proj, self.mlp = norm, qkv, attn, proj, mlp

    def forward(self, x: Tensor, start: Start) -> Tensor:
        return self.mlp(self.proj(self.attn(*self.qkv(self.norm(x), start)), x))  # type: ignore[no-any-return]
