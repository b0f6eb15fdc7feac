"""Attention whose sequence is spread over ranks: ring, Ulysses, their 2-D product and the double ring.

Every rank calls with its own tokens, as `shard` or `from_contiguous` (helixpipe.sequence.reorder) gives them in
the same layout, and gets its own tokens' output. One function serves them all; what differs is the mesh:

    tokens over heads x rings ──all-to-all──► tokens over rings, heads over ranks ──ring──► ... ──all-to-all──► back
                               (heads > 1)                                                       (heads > 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.model.attention import KeptAttention, Rule
from helixpipe.model.merging import ALL
from helixpipe.model.tiles import Span, Tile, tiles
from helixpipe.sequence.documents import Documents
from helixpipe.sequence.layout import Layout
from helixpipe.sequence.mesh import SequenceMesh, mesh_of
from helixpipe.sequence.spread import Plan, Spread
from helixpipe.sequence.wire import Exchange, Group


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group | SequenceMesh = None,
    causal: bool = True,
    layout: str = "zigzag",
    documents: Documents | Tensor | Sequence[int] | None = None,
    kept: KeptAttention | None = None,
    window: int = 0,
    softcap: float = 0.0,
    scale: float = 0.0,
) -> Tensor:
    """Exact attention with keys and values passed around a ring (arXiv 2105.13120, blockwise as in 2310.01889).

    q [b, s_local, heads, d]; k, v [b, s_local, kv_heads, d], kv_heads dividing heads; out like q. Each rank hands
    over its tokens in `layout`: plain, zigzag or striped. `group`: a process group (None: all ranks, or this
    process alone), or a `SequenceMesh` for a double ring or for rings whose ranks also divide the heads (2-D:
    USP, arXiv 2405.07719; double ring: LoongTrain, arXiv 2406.18485).

    `documents`: cumulative lengths of the whole sequence, ids per token [b, s], or `Documents`; none attends to
    another. `kept`: filled with the output and log-sum-exp; when it comes filled, they are taken from it and
    nothing is computed or sent (`model.attention.KeptAttention`; with divided heads, [b, heads / n, n * s_local, d]).

    `window`: a token at i sees j where |i - j| < window, and j <= i when causal; 0 is all. Nothing outside it is computed.
    `softcap`: c of c * tanh(score / c); 0 is none. `scale`: what q.k is multiplied by; 0 is d ** -0.5.

    Sends 2 * b * s * kv_heads * d * (N-1) / N elements a rank in the forward, s the whole sequence, and twice as
    many in the backward, of which the gradients are in float32 or wider. With a causal window and plain shards it sends
    to no more ranks than the window reaches back to. Raises ConfigError, RankError.
    """
    mesh = mesh_of(group)
    check_shapes(q, k, v)
    lay = mesh.layout(q.shape[1] * mesh.size, layout)
    packed = None if documents is None else Documents.of(documents, lay.length, q.shape[0])
    if mesh.heads > 1:
        q, k, v = to_heads(q, k, v, mesh)
    out: Tensor = Spread.apply(q, k, v, _plan(mesh, lay, Rule(causal, window, softcap, scale), packed), kept)  # type: ignore[no-untyped-call]
    return to_sequence(out, mesh) if mesh.heads > 1 else out


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group | SequenceMesh = None,
    causal: bool = True,
    documents: Documents | Tensor | Sequence[int] | None = None,
    kept: KeptAttention | None = None,
    window: int = 0,
    softcap: float = 0.0,
    scale: float = 0.0,
) -> Tensor:
    """Exact attention with tokens exchanged for heads and back (DeepSpeed Ulysses, arXiv 2309.14509).

    As `ring_attention`, with contiguous shards: each rank attends to the whole sequence with heads / N of the heads.
    Where kv_heads do not divide over the ranks they are repeated first and their gradients summed. Sends
    (2 * heads + 2 * kv_heads) * b * s * d * (N-1) / N² elements a rank in the forward, and as many in the backward.
    """
    mesh = group
    if not isinstance(mesh, SequenceMesh):
        mesh = mesh_of(group)
        mesh = SequenceMesh(mesh.group, rings=1, heads=mesh.size)
    return ring_attention(q, k, v, mesh, causal, "plain", documents, kept, window, softcap, scale)


def _plan(mesh: SequenceMesh, layout: Layout, rule: Rule, documents: Documents | None) -> Plan:
    def of(steps: tuple[int, ...]) -> list[tuple[slice, Tile]]:
        places = mesh.place, mesh.place_of(steps)
        if documents is None:
            return [(ALL, tile) for tile in _tiles(layout, *places, rule.causal, rule.window, None)]
        return [
            (row.batch, tile)
            for row in documents.rows
            for tile in _tiles(layout, *places, rule.causal, rule.window, row.spans)
        ]

    def meets(place: int, source: int) -> bool:
        return bool(_tiles(layout, place, source, rule.causal, rule.window, None))

    return Plan(mesh.rings, of, rule, (lambda before: mesh.last_step(before, meets)) if rule.window else None)


@lru_cache(maxsize=1024)
def _tiles(
    layout: Layout, place: int, source: int, causal: bool, window: int, spans: tuple[Span, ...] | None
) -> list[Tile]:
    return tiles(layout.runs(place), layout.runs(source), causal, spans, window)


def to_heads(q: Tensor, k: Tensor, v: Tensor, mesh: SequenceMesh) -> tuple[Tensor, ...]:
    """[b, s, heads, d] -> [b, n * s, heads / n, d] of each, in one message a rank."""
    n, kv_heads = mesh.heads, k.shape[2]
    if q.shape[2] % n:
        fits = [i for i in range(1, q.shape[2] + 1) if q.shape[2] % i == 0]
        raise ConfigError(
            f"sequence.heads: {q.shape[2]} heads do not divide over {n} ranks; use {_or(fits)} ranks for the heads "
            "and rings for the rest"
        )
    times = math.lcm(kv_heads, n) // kv_heads
    if times > 1:  # ranks that share a head each get it; the backward sums what they owe it
        k, v = (t.repeat_interleave(times, dim=2) for t in (k, v))
    sizes = [t.shape[2] // n for t in (q, k, v)]
    packed = torch.cat([t.unflatten(2, (n, -1)).movedim(2, 0) for t in (q, k, v)], dim=3)
    received: Tensor = Exchange.apply(packed, mesh.over_heads)  # type: ignore[no-untyped-call]
    return received.movedim(0, 1).flatten(1, 2).split(sizes, dim=2)  # type: ignore[no-any-return]


def to_sequence(out: Tensor, mesh: SequenceMesh) -> Tensor:
    """[b, n * s, heads / n, d] -> [b, s, heads, d]"""
    parts = out.unflatten(1, (mesh.heads, -1)).movedim(1, 0)
    received: Tensor = Exchange.apply(parts, mesh.over_heads)  # type: ignore[no-untyped-call]
    return received.movedim(0, 2).flatten(2, 3)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ConfigError for q, k and v that do not fit together."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ConfigError(
            f"sequence: {shapes}; give q [b, s, heads, d] and k, v [b, s, kv_heads, d] of the same b, s, d"
        )
    if q.shape[2] % k.shape[2]:
        fits = [i for i in range(1, q.shape[2] + 1) if q.shape[2] % i == 0]
        raise ConfigError(f"sequence.kv_heads: {k.shape[2]} do not divide {q.shape[2]} heads; use {_or(fits)}")


def _or(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
