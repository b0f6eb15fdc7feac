"""Linformer's attention with its sequence over ranks (arXiv 2006.04768; 2105.13120, section 4.3).

Keys and values are projected along the sequence, from s tokens to p. Each rank projects its own tokens and the
projections are summed over ranks, so a rank never holds a key of another, only 2 * b * p * kv_heads * d elements:

    rank r   K' += E[:, r] K_r     V' += F[:, r] V_r     all-reduce     softmax(Q_r K'ᵀ) V'
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.model.attention import KeptAttention
from helixpipe.model.merging import ALL
from helixpipe.model.tiles import Tile
from helixpipe.sequence.attention import check_shapes
from helixpipe.sequence.documents import Documents
from helixpipe.sequence.mesh import SequenceMesh, mesh_of
from helixpipe.sequence.spread import Plan, Spread
from helixpipe.sequence.wire import Group, Sum


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    project_k: Tensor,
    project_v: Tensor,
    group: Group | SequenceMesh = None,
    layout: str = "plain",
    documents: Documents | Tensor | Sequence[int] | None = None,
    kept: KeptAttention | None = None,
) -> Tensor:
    """Bidirectional attention of q [b, s_local, heads, d] to p projected keys and values; out like q.

    `project_k`, `project_v`: [p, s_local], this rank's columns of the whole [p, s] (`shard` with dim=1 gives them).
    Each document is projected by itself, to p keys of its own. The sum over ranks is in float32 or wider, forward
    and backward. The rest as in `ring_attention`. Raises ConfigError, RankError.
    """
    check_shapes(q, k, v)
    mesh = mesh_of(group)
    lay = mesh.layout(q.shape[1] * mesh.size, layout)
    for name, projection in (("project_k", project_k), ("project_v", project_v)):
        if projection.dim() != 2 or projection.shape != (project_k.shape[0], q.shape[1]):
            raise ConfigError(
                f"sequence.{name}: {list(projection.shape)} for {q.shape[1]} tokens a rank; "
                f"give this rank's columns, [p, {q.shape[1]}], p the same for both"
            )
    packed = None if documents is None else Documents.of(documents, lay.length, q.shape[0])
    pieces = _pieces(packed, lay.positions(mesh.rank))
    count = 1 if packed is None else _most(packed)
    wide = torch.promote_types(q.dtype, torch.float32)
    projected = []
    for projection, tensor in ((project_k, k), (project_v, v)):
        part = _projected(projection, tensor, pieces, count)
        whole: Tensor = Sum.apply(part.to(wide), mesh.group)  # type: ignore[no-untyped-call]
        projected.append(whole.to(q.dtype))
    p = project_k.shape[0]
    todo = [(batch, Tile(own.start, own.stop, i * p, (i + 1) * p, False)) for batch, i, own in pieces]
    out: Tensor = Spread.apply(q, *projected, Plan((), lambda _: todo), kept)  # type: ignore[no-untyped-call]
    return out


Piece = tuple[slice, int, slice]
"""sequences of the batch, the document's index among its row's, this rank's tokens of it"""


def _pieces(documents: Documents | None, positions: Tensor) -> list[Piece]:
    if documents is None:
        return [(ALL, 0, slice(0, len(positions)))]
    found: list[Piece] = []
    for row in documents.rows:
        index = {document: i for i, document in enumerate(dict.fromkeys(span.document for span in row.spans))}
        starts = torch.tensor([span.start for span in row.spans])
        spans, counts = torch.unique_consecutive(
            torch.searchsorted(starts, positions, right=True) - 1, return_counts=True
        )
        stop = 0
        for span, tokens in zip(spans.tolist(), counts.tolist(), strict=True):
            found.append((row.batch, index[row.spans[span].document], slice(stop, stop + tokens)))
            stop += tokens
    return found


def _most(documents: Documents) -> int:
    return max(len({span.document for span in row.spans}) for row in documents.rows)


def _projected(projection: Tensor, tensor: Tensor, pieces: list[Piece], count: int) -> Tensor:
    """[b, count * p, kv_heads, d]: this rank's share of every document's projection."""
    b, _, heads, d = tensor.shape
    p = projection.shape[0]
    if len(pieces) == 1 and count == 1:
        return torch.einsum("ps,bshd->bphd", projection, tensor)
    total = tensor.new_zeros(b, count, p, heads, d)
    for batch, i, own in pieces:
        total[batch, i] += torch.einsum("ps,bshd->bphd", projection[:, own], tensor[batch, own])
    return total.flatten(1, 2)
