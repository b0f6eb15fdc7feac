"""Context parallelism: attention of a sequence whose tokens are spread over ranks, whole or segment by segment.

    ring      keys and values travel around the ranks; causal work is even in the zigzag layout
    ulysses   tokens are exchanged for heads and back, and attention here is as with one rank

With segments (Seq1F1B) every segment is spread over all ranks. Each rank keeps its own tokens' keys and values of
earlier segments, and one round of the ring takes them along:

    segment 2, rank r    q2 . [k0 k1 k2] of every rank     k0 k1: all see all     k2: causal, by where the tokens are
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helixpipe.errors import ConfigError
from helixpipe.model.attention import AttentionState, KeptAttention, KeyValues, attend
from helixpipe.model.attn import Attention
from helixpipe.parts.part import Part
from helixpipe.sequence.attention import to_heads, to_sequence
from helixpipe.sequence.layout import Layout
from helixpipe.sequence.mesh import SequenceMesh
from helixpipe.sequence.spread import ALL, Plan, Spread
from helixpipe.sequence.tiles import Tile, tiles


class Context:
    """How the ranks of a group share sequences; `method` is ring or ulysses, `layout` the ring's."""

    def __init__(self, group: ProcessGroup, method: str, layout: str) -> None:
        over_heads = group.size() if method == "ulysses" else 1
        self.mesh = SequenceMesh(group, heads=over_heads)
        self.kind = "plain" if method == "ulysses" else layout

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: AttentionState) -> Tensor:
        """As `model.attention.attend`, of this rank's tokens against those of all ranks."""
        if self.mesh.heads > 1:
            q, k, v = to_heads(q, k, v, self.mesh)
            if state.key_values is not None:  # they come as views of one storage, and k and v stay longer
                q, k, v = q.clone(), k.clone(), v.clone()
            here = attend(q, k, v, causal, replace(state, in_place=False)).unflatten(2, q.shape[2:])
            return to_sequence(here, self.mesh).flatten(2)
        out: Tensor
        if state.key_values is None:
            out = Spread.apply(q, k, v, self._plan(q.shape[1], 0, causal), state.kept)  # type: ignore[no-untyped-call]
        else:
            before = state.key_values.length(state.segment)
            out = _Segment.apply(q, k, v, self._plan(q.shape[1], before, causal), state)  # type: ignore[no-untyped-call]
        return out.flatten(2)

    def _plan(self, length: int, before: int, causal: bool) -> Plan:
        """`length` tokens of a segment on every rank, and `before` of earlier segments."""
        layout = self.mesh.layout(length * self.mesh.size, self.kind)

        def of(steps: tuple[int, ...]) -> list[tuple[slice, Tile]]:
            return [(ALL, tile) for tile in _tiles(layout, self.mesh.place, self.mesh.place_of(steps), before, causal)]

        return Plan(self.mesh.rings, of)


@lru_cache(maxsize=256)
def _tiles(layout: Layout, place: int, source: int, before: int, causal: bool) -> list[Tile]:
    """Of this place's queries against the keys of `source`: those of earlier segments first, then of this one."""
    own = tiles(layout.runs(place), layout.runs(source), causal)
    found = [Tile(t.q_start, t.q_stop, before + t.k_start, before + t.k_stop, t.causal) for t in own]
    return [Tile(0, layout.local_length, 0, before, False), *found] if before else found


class _Segment(torch.autograd.Function):
    """q of a segment against the keys and values so far. As `Spread`, but earlier ones are saved once for all."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, state: AttentionState) -> Tensor:
        past = state.key_values
        assert past is not None
        past.add(state.segment, k, v)
        kept = state.kept or KeptAttention()
        out: Tensor = Spread.apply(q, *_so_far(past, state.segment, k, v), plan, kept)  # type: ignore[no-untyped-call]
        ctx.save_for_backward(q, k, v, kept.out, kept.lse)
        ctx.plan, ctx.state = plan, state
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        past, segment = ctx.state.key_values, ctx.state.segment
        whole = _so_far(past, segment, k, v)
        before = whole[0].shape[1] - k.shape[1]
        with torch.enable_grad():  # a replay: nothing is attended or sent
            leaves = [t.detach().requires_grad_() for t in (q, *whole)]
            replayed = Spread.apply(*leaves, ctx.plan, KeptAttention(out, lse))  # type: ignore[no-untyped-call]
        dq, dk, dv = torch.autograd.grad(replayed, leaves, grad)
        if before:
            past.owe(range(segment), dk[:, :before], dv[:, :before])
        dk, dv = past.settle(segment, dk[:, before:], dv[:, before:])
        return dq, dk, dv, None, None


def _so_far(past: KeyValues, segment: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not segment:
        return k, v
    before_k, before_v = past.prefix(segment)
    return torch.cat((before_k, k), 1), torch.cat((before_v, v), 1)
