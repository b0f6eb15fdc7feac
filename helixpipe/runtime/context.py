"""Context parallelism: attention of a sequence whose tokens are spread over ranks, whole or segment by segment.

    ring      keys and values travel around the ranks; causal work is even in the zigzag layout
    ulysses   tokens are exchanged for heads and back, and attention here is as with one rank

With segments (Seq1F1B) every segment is spread over all ranks. Each rank keeps its own tokens' keys and values of
earlier segments, and one round of the ring takes them along:

    segment 2, rank r    q2 . [k0 k1 k2] of every rank     k0 k1: all see all     k2: causal, by where the tokens are

With a window, and of documents, only the segments that are seen go along, and of each no more of its last tokens than any
rank keeps. Where no rank sees anything of what is further around the ring, it ends early.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helixpipe.errors import ConfigError
from helixpipe.model.attention import AttentionState, KeptAttention, KeyValues, Rule, attend
from helixpipe.model.attn import Attention
from helixpipe.model.merging import ALL, Share
from helixpipe.model.packed import Packed
from helixpipe.model.tiles import Run, Span, Tile, tiles
from helixpipe.parts.part import Part
from helixpipe.sequence.attention import to_heads, to_sequence
from helixpipe.sequence.layout import Layout
from helixpipe.sequence.mesh import SequenceMesh
from helixpipe.sequence.spread import Plan, Spread


class Context:
    """How the ranks of a group share sequences; `method` is ring or ulysses, `layout` the ring's."""

    def __init__(self, group: ProcessGroup, method: str, layout: str) -> None:
        over_heads = group.size() if method == "ulysses" else 1
        self.mesh = SequenceMesh(group, heads=over_heads)
        self.kind = "plain" if method == "ulysses" else layout
        self._last = lru_cache(maxsize=256)(self._last_step)  # found once for all layers

    def positions(self, length: int) -> Tensor:
        """Where this rank's tokens of a segment of `length` are in it: int64 [length / ranks], rising."""
        return self.mesh.layout(length, self.kind).positions(self.mesh.rank)

    def join(self, part: Part, module: nn.Module) -> None:
        """Let a part's attention run over the ranks; raises ConfigError when it has one that is not known here."""
        found = [inner for inner in module.modules() if isinstance(inner, Attention)]
        if (part.about.attends or part.about.opaque) and not found:
            raise ConfigError(
                f"mesh.cp: the attention inside {part} is {type(module).__name__}'s own and cannot be spread over ranks; "
                "use cp 1, or helixpipe.Attention in it"
            )
        for inner in found:
            inner.attend = self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: AttentionState) -> Tensor:
        """As `model.attention.attend`, of this rank's tokens against those of all ranks."""
        if self.mesh.heads > 1:
            q, k, v = to_heads(q, k, v, self.mesh)
            if state.key_values is not None:  # they come as views of one storage, and k and v stay longer
                q, k, v = q.clone(), k.clone(), v.clone()
            here = attend(q, k, v, rule, replace(state, in_place=False)).unflatten(2, q.shape[2:])
            return to_sequence(here, self.mesh).flatten(2)
        out: Tensor
        own = Piece(self.mesh.layout(q.shape[1] * self.mesh.size, self.kind), 0, q.shape[1])
        if state.key_values is None:
            out = Spread.apply(q, k, v, self._plan(own, (), rule, state.packed), state.kept)  # type: ignore[no-untyped-call]
        else:
            out = self._of_segment(q, k, v, own, rule, state)
        return out.flatten(2)

    def _of_segment(self, q: Tensor, k: Tensor, v: Tensor, own: Piece, rule: Rule, state: AttentionState) -> Tensor:
        past, segment = state.key_values, state.segment
        assert past is not None
        tail = state.tail(own.layout.length, rule.window)
        past.add(segment, k, v, _local_tail(own.layout, tail), own.layout.length)
        segments = past.seen(segment, rule.window)
        earlier = tuple(
            Piece(self.mesh.layout(past.lengths[s], self.kind), past.start(s) - past.start(segment), past.tails[s])
            for s in segments
        )
        plan = self._plan(own, earlier, rule, state.packed)
        out: Tensor = _Segment.apply(q, k, v, plan, segments, state)  # type: ignore[no-untyped-call]
        return out

    def _plan(self, own: Piece, earlier: tuple[Piece, ...], rule: Rule, packed: Packed | None) -> Plan:
        """A segment's tokens, and what is seen of earlier segments, on every rank."""
        mesh, causal, window = self.mesh, rule.causal, rule.window

        def of(steps: tuple[int, ...]) -> list[Share]:
            if packed is not None:
                return _packed_tiles(own, earlier, mesh.place, mesh.place_of(steps), causal, window, packed)
            return [(ALL, tile) for tile in _tiles(own, earlier, mesh.place, mesh.place_of(steps), causal, window)]

        def meets(place: int, source: int) -> bool:
            return bool(_tiles(own, earlier, place, source, causal, window))

        if packed is not None:
            return Plan(mesh.rings, of, rule, lambda before: self._last(before, own, earlier, causal, window, packed))
        return Plan(mesh.rings, of, rule, (lambda before: mesh.last_step(before, meets)) if window else None)

    def _last_step(
        self, before: tuple[int, ...], own: Piece, earlier: tuple[Piece, ...], causal: bool, window: int, packed: Packed
    ) -> int:
        """The last step of a ring at which any place sees something of a document, the same on all of them."""

        def meets(place: int, source: int) -> bool:
            return bool(packed.shares(lambda spans: _cut(own, earlier, place, source, causal, window, spans)))

        return self.mesh.last_step(before, meets)


class Piece(NamedTuple):
    """What is here of a segment: the last `tokens` of those that a rank has of it."""

    layout: Layout
    start: int
    """Its first position, counted from that of the segment that attends."""
    tokens: int

    def runs(self, place: int) -> tuple[Run, ...]:
        """Where they are, rising."""
        found: list[Run] = []
        left = self.tokens
        for run in reversed(self.layout.runs(place)):
            count = min(run.count, left)
            if count:
                first = self.start + run.start + (run.count - count) * run.stride
                found.insert(0, Run(first, run.stride, count))
            left -= count
        return tuple(found)


@lru_cache(maxsize=1024)
def _local_tail(layout: Layout, seen: int) -> int:
    """How many of its last tokens a rank keeps of a segment, of which the last `seen` are seen: as many as the rank that has
    most of these."""
    unseen = layout.length - seen
    return max(sum(run.count - _before(run, unseen) for run in layout.runs(place)) for place in range(layout.ring))


def _before(run: Run, position: int) -> int:
    """How many tokens of a run are before a position."""
    return min(max(0, -((run.start - position) // run.stride)), run.count)


@lru_cache(maxsize=1024)
def _tiles(own: Piece, earlier: tuple[Piece, ...], place: int, source: int, causal: bool, window: int) -> list[Tile]:
    """Of this place's queries against the keys of `source`: those of earlier segments first, then of this one."""
    before = sum(piece.tokens for piece in earlier)
    if window or not before:
        return _cut(own, earlier, place, source, causal, window, None)
    return [Tile(0, own.tokens, 0, before, False), *_cut(own, (), place, source, causal, window, None, before)]


@lru_cache(maxsize=1024)
def _packed_tiles(
    own: Piece, earlier: tuple[Piece, ...], place: int, source: int, causal: bool, window: int, packed: Packed
) -> list[Share]:
    """The same of each sequence, whose documents hide what is not of them."""
    return packed.shares(lambda spans: _cut(own, earlier, place, source, causal, window, spans))


def _cut(
    own: Piece, earlier: tuple[Piece, ...], place: int, source: int, causal: bool, window: int,
    spans: tuple[Span, ...] | None, first: int = 0,
) -> list[Tile]:  # fmt: skip
    """`first`: where the keys of `earlier`, and then of this segment, begin."""
    found: list[Tile] = []
    for piece in (*earlier, own):
        keys = piece.runs(source)
        cut = tiles(own.runs(place), keys, causal, spans, window) if keys else []
        found += [replace(t, k_start=first + t.k_start, k_stop=first + t.k_stop) for t in cut]
        first += piece.tokens
    return found


class _Segment(torch.autograd.Function):
    """q of a segment against the keys and values so far. As `Spread`, but earlier ones are saved once for all."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, segments: range, state: AttentionState
    ) -> Tensor:
        kept = state.kept or KeptAttention()
        so_far = _so_far(state.key_values, segments, k, v)
        out: Tensor = Spread.apply(q, *so_far, plan, kept)  # type: ignore[no-untyped-call]
        ctx.save_for_backward(q, k, v, kept.out, kept.lse)
        ctx.plan, ctx.segments, ctx.state = plan, segments, state
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        past, segments = ctx.state.key_values, ctx.segments
        whole = _so_far(past, segments, k, v)
        before = whole[0].shape[1] - k.shape[1]
        with torch.enable_grad():  # a replay: nothing is attended or sent
            leaves = [t.detach().requires_grad_() for t in (q, *whole)]
            replayed = Spread.apply(*leaves, ctx.plan, KeptAttention(out, lse))  # type: ignore[no-untyped-call]
        dq, dk, dv = torch.autograd.grad(replayed, leaves, grad)
        if segments:
            past.owe(segments, dk[:, :before], dv[:, :before])
        dk, dv = past.settle(ctx.state.segment, dk[:, before:], dv[:, before:])
        return dq, dk, dv, None, None, None


def _so_far(past: KeyValues | None, segments: range, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not segments or past is None:
        return k, v
    before_k, before_v = past.prefix(segments)
    return torch.cat((before_k, k), 1), torch.cat((before_v, v), 1)
