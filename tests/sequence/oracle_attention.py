"""Attention by the book on one process, and cases that run over ranks against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.sequence import SequenceMesh, gather, ring_attention, shard, ulysses_attention


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Sequence[int] | Tensor | None, window: int = 0,
    softcap: float = 0.0, scale: float = 0.0,
) -> Tensor:  # fmt: skip
    """softmax(QKᵀ/√d)V with an explicit mask; [b, s, heads, d]."""
    b, s, heads, d = q.shape
    k, v = (t.repeat_interleave(heads // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or d**-0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    may = ids_of(documents, b, s).unsqueeze(2) == ids_of(documents, b, s).unsqueeze(1)
    if causal:
        may = may & torch.ones(s, s).tril().bool()
    if window:
        may = may & ((torch.arange(s) - torch.arange(s).unsqueeze(1)).abs() < window)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~may.unsqueeze(1), float("-inf")).softmax(-1), v)


def ids_of(documents: Sequence[int] | Tensor | None, b: int, s: int) -> Tensor:
    """[b, s]"""
    if documents is None:
        return torch.zeros(b, s, dtype=torch.int64)
    if isinstance(documents, Tensor):
        return documents
    return torch.bucketize(torch.arange(s), torch.tensor(documents[1:]), right=True).expand(b, s)


@dataclass(frozen=True)
class Case:
    """One call over `rings` x `heads_over` ranks."""

    method: str = "ring"
    rings: tuple[int, ...] = (2,)
    heads_over: int = 1
    layout: str = "zigzag"
    causal: bool = True
    documents: str = "none"
    length: int = 24
    heads: int = 4
    kv_heads: int = 4
    batch: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.0

    @property
    def scoring(self) -> dict[str, Any]:
        return {"window": self.window, "softcap": self.softcap, "scale": self.scale}

    @property
    def ranks(self) -> int:
        total = self.heads_over
        for size in self.rings:
            total *= size
        return total

    def inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, whole, in float64 but of values that `dtype` can hold."""
        generator = torch.Generator().manual_seed(0)
        many = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, self.length, heads, self.head_dim) for heads in many]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [t.to(self.dtype).double() for t in drawn]

    def packed(self) -> Sequence[int] | Tensor | None:
        """Documents that begin and end inside and across ranks' chunks."""
        s = self.length
        if self.documents == "lengths":
            return (0, 3, 4, s // 2 + 1, s)
        if self.documents == "ids":  # each sequence of the batch packed otherwise, one with a document interrupted
            ids = torch.stack([(torch.arange(s) * (row + 2) // s) for row in range(self.batch)])
            ids[-1, s // 3 : s // 2] = 9
            return ids
        return None


def expected(case: Case) -> list[Tensor]:
    """out, dq, dk, dv"""
    q, k, v, grad = case.inputs()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = plain_attention(q, k, v, case.causal, case.packed(), **case.scoring)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


_MESHES: dict[tuple[tuple[int, ...], int], SequenceMesh | None] = {}


def mesh_for(rings: tuple[int, ...], heads: int) -> SequenceMesh | None:
    """On the first ranks of the pool; None on the others. Made once: groups stay open as long as the process."""
    if (rings, heads) not in _MESHES:
        size = heads
        for ring in rings:
            size *= ring
        group = dist.new_group(range(size)) if size < dist.get_world_size() else dist.group.WORLD
        inside = dist.get_rank() < size
        _MESHES[rings, heads] = SequenceMesh(group, rings=rings, heads=heads) if inside else None
    return _MESHES[rings, heads]


def attend(case: Case, mesh: SequenceMesh, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    if case.method == "ulysses":
        return ulysses_attention(q, k, v, mesh, case.causal, case.packed(), **case.scoring, **more)
    return ring_attention(q, k, v, mesh, case.causal, case.layout, case.packed(), **case.scoring, **more)


def spread(case: Case) -> list[Tensor] | None:
    """out, dq, dk, dv, gathered from all ranks of the case."""
    mesh = mesh_for(case.rings, case.heads_over)
    if mesh is None:
        return None
    *local, grad = (shard(t.to(case.dtype), mesh, case.layout) for t in case.inputs())
    leaves = [t.requires_grad_() for t in local]
    out = attend(case, mesh, *leaves)
    assert out.shape == leaves[0].shape
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert all(t.dtype == case.dtype for t in found)
    return [gather(t, mesh, case.layout) for t in found]


def worst(found: Sequence[Tensor], reference: Sequence[Tensor], error: Callable[[Tensor, Tensor], float]) -> float:
    return max(error(mine.double(), theirs) for mine, theirs in zip(found, reference, strict=True))


def largest_difference(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).abs().max())


def relative_norm(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())
