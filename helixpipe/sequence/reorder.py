"""Tokens to the ranks that hold them, and back: nobody outside reorders anything.

    shard             a whole tensor, the same on every rank   ->  this rank's tokens
    gather            this rank's tokens                       ->  the whole tensor, on every rank
    from_contiguous   contiguous shards                        ->  shards in a layout, in one all-to-all
    to_contiguous     and back

All are differentiable. Gradients are those of the sum of all ranks' losses: where every rank computes the same
loss from a gathered tensor, let one rank count it, or divide it by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helixpipe.sequence.documents import Documents
from helixpipe.sequence.layout import Layout
from helixpipe.sequence.mesh import SequenceMesh, mesh_of
from helixpipe.sequence.wire import Exchange, Group, all_gather, all_sum

IGNORED = -100
"""A target that counts for nothing, as in torch's cross entropy."""


class Shard(NamedTuple):
    """A rank's part of a batch, each int64 [b, s_local]."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    """From 0 in every document: what rotary or learned positions take."""


def shard(whole: Tensor, group: Group | SequenceMesh = None, layout: str = "zigzag", dim: int = 1) -> Tensor:
    """This rank's tokens of a tensor whose dimension `dim` is the whole sequence. Sends nothing; ConfigError."""
    mesh = mesh_of(group)
    return mesh.layout(whole.shape[dim], layout).shard(whole, mesh.rank, dim)


def gather(local: Tensor, group: Group | SequenceMesh = None, layout: str = "zigzag", dim: int = 1) -> Tensor:
    """The whole tensor, in the sequence's own order, on every rank."""
    mesh = mesh_of(group)
    whole: Tensor = _Gather.apply(local, mesh, mesh.layout(local.shape[dim] * mesh.size, layout), dim)  # type: ignore[no-untyped-call]
    return whole


def from_contiguous(local: Tensor, group: Group | SequenceMesh = None, layout: str = "zigzag", dim: int = 1) -> Tensor:
    """Rank r's tokens in `layout`, from shards where rank r has tokens r * s_local onwards."""
    mesh = mesh_of(group)
    if mesh.group is None:
        return local
    lay = mesh.layout(local.shape[dim] * mesh.size, layout)
    sent, received = _counts(lay, mesh.rank)
    # tokens rise in every layout, so what each rank sends is in order, and so is what comes
    order = torch.cat([p - mesh.rank * lay.local_length for p in _of_mine(lay, mesh.rank)]).to(local.device)
    moved: Tensor = Exchange.apply(local.movedim(dim, 0)[order], mesh.everyone, sent, received)  # type: ignore[no-untyped-call]
    return moved.movedim(0, dim)


def to_contiguous(local: Tensor, group: Group | SequenceMesh = None, layout: str = "zigzag", dim: int = 1) -> Tensor:
    """The inverse of `from_contiguous`."""
    mesh = mesh_of(group)
    if mesh.group is None:
        return local
    lay = mesh.layout(local.shape[dim] * mesh.size, layout)
    received, sent = _counts(lay, mesh.rank)
    moved: Tensor = Exchange.apply(local.movedim(dim, 0), mesh.everyone, sent, received)  # type: ignore[no-untyped-call]
    order = torch.cat(_of_mine(lay, mesh.rank)).argsort().to(local.device)
    return moved[order].movedim(0, dim)


def shard_batch(
    tokens: Tensor,
    group: Group | SequenceMesh = None,
    layout: str = "zigzag",
    documents: Documents | Tensor | Sequence[int] | None = None,
) -> Shard:
    """This rank's tokens, next-token targets and positions, of whole sequences [b, s], the same on every rank.

    Targets are shifted before the sequence is cut. The last token of a document has none (-100).
    """
    mesh = mesh_of(group)
    b, length = tokens.shape
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:]
    positions = torch.arange(length, device=tokens.device).repeat(b, 1)
    for row in Documents.of(documents, length, b).rows if documents is not None else ():
        for span in row.spans:
            targets[row.batch, span.stop - 1] = IGNORED
            positions[row.batch, span.start : span.stop] -= span.start
    return Shard(*(shard(each, mesh, layout) for each in (tokens, targets, positions)))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: SequenceMesh, layout: Layout, dim: int) -> Tensor:
        ctx.mesh, ctx.layout, ctx.dim = mesh, layout, dim
        held = torch.cat([layout.positions(rank, local.device) for rank in range(mesh.size)])
        return torch.cat(all_gather(local, mesh.group), dim).index_select(dim, held.argsort())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layout.shard(all_sum(grad, ctx.mesh.group), ctx.mesh.rank, ctx.dim), None, None, None


def _of_mine(layout: Layout, rank: int) -> list[Tensor]:
    """Of the tokens of contiguous shard `rank`, those that each rank holds in the layout."""
    low, high = rank * layout.local_length, (rank + 1) * layout.local_length
    held = [layout.positions(other) for other in range(layout.ranks)]
    return [p[(low <= p) & (p < high)] for p in held]


def _counts(layout: Layout, rank: int) -> tuple[list[int], list[int]]:
    """Tokens that go from contiguous shard `rank` to each rank of the layout, and that this rank gets from each."""
    sent = [len(p) for p in _of_mine(layout, rank)]
    mine = layout.positions(rank) // layout.local_length
    return sent, torch.bincount(mine, minlength=layout.ranks).tolist()
