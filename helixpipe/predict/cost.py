"""Cost: how long each part takes in each pass, each action, and each message.

    part      forward | input gradients (I) | weight gradients (W)      from an accelerator's rates, or from a profile
    action    F = forward of its parts        I = recompute + input gradients
              B = I + W, recompute and all    R = the recompute that the backward then need not do
    message   bytes over a link

Attention has no weights: its backward is all I, 2.5 times its forward, since a fused kernel computes the scores again.
Causal attention counts the half that kernels compute, and a window what it shows.

A rank may be a group of accelerators, tensor x context. Each has its share of every FLOP and byte. Tensor parallelism
pays, in every layer, for two gathers and two scatters of [b, s, h] forward and as many backward, which nothing hides;
context parallelism for a ring of keys and values in every attention, which the attention hides where it is the longer
(2 b s h_kv (N-1)/N elements forward; backward the same, with their gradients in float32 beside them), or, as Ulysses, for two
exchanges of tokens for heads and back, which nothing hides (2 b s (h + h_kv) (N-1)/N^2 elements, backward as many).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work, first_alike
from helixpipe.predict.hardware import Accelerator, Link
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.lower import of_each
from helixpipe.schedule.program import Kind, Message, Program
from helixpipe.schedule.schedule import Schedule


class PartCosts(Protocol):
    """Seconds of one part on one segment. What `Analytic` computes and a measured `Profile` interpolates."""

    def forward_s(self, part: Part, batch: Batch, segment: int) -> float: ...

    def input_s(self, part: Part, batch: Batch, segment: int) -> float:
        """Gradients of its inputs: all of a backward but the weight gradients of linear layers."""
        ...

    def weight_s(self, part: Part, batch: Batch, segment: int) -> float: ...


@dataclass(frozen=True)
class Analytic:
    """Part costs from FLOPs and bytes over an accelerator's rates."""

    shape: ModelShape
    accelerator: Accelerator
    element_bytes: int = 2
    tensor_parallel: int = 1
    tensor_link: Link | None = None
    """What connects the accelerators of one tensor-parallel group; None is free."""
    context_parallel: int = 1
    context_link: Link | None = None
    """The same of a context-parallel group."""
    vocabulary_divided: bool = False
    """Whether a tensor-parallel group divides the vocabulary too, as Megatron's does."""
    context_method: str = "ring"
    """ring or ulysses."""

    def __post_init__(self) -> None:
        self.accelerator.rate(self.element_bytes)  # refused now rather than at the first part

    def forward_s(self, part: Part, batch: Batch, segment: int) -> float:
        flops = self.shape.forward_flops(part, batch, segment)
        return self._seconds(part, flops, batch, segment, backward=False)

    def input_s(self, part: Part, batch: Batch, segment: int) -> float:
        flops = self.shape.backward_flops(part, batch, segment) - self.shape.weight_flops(part, batch, segment)
        return self._seconds(part, flops, batch, segment, backward=True)

    def weight_s(self, part: Part, batch: Batch, segment: int) -> float:
        flops = self.shape.weight_flops(part, batch, segment)
        group = self.tensor_parallel * self.context_parallel
        rate = self.accelerator.rate(self.element_bytes) * self.accelerator.matmul_efficiency * group
        return flops / rate + (self.accelerator.launch_s if flops else 0.0)

    def _seconds(self, part: Part, flops: float, batch: Batch, segment: int, backward: bool) -> float:
        device = self.accelerator
        about = self.shape.about(part)
        if about.hands_on:
            return 0.0
        reached = device.matmul_efficiency
        if about.attends:
            reached = device.attention_backward_efficiency if backward else device.attention_efficiency
        moved = about.moved(part, Work(self.shape, batch, segment))
        moved_bytes = moved * self.element_bytes * (2 if backward else 1)
        compute_s = flops / (device.rate(self.element_bytes) * reached)
        moved_s = moved_bytes / (device.memory_bytes_per_s * device.memory_efficiency)
        taken_s = (compute_s + moved_s) / (self.tensor_parallel * self.context_parallel)
        if about.attends and self.context_method == "ulysses":
            taken_s += self._heads_s(batch, segment)
        elif about.attends:
            taken_s = max(taken_s, self._ring_s(part, batch, segment, backward))
        return device.launch_s + taken_s + self._exchange_s(part, batch, segment)

    def _exchange_s(self, part: Part, batch: Batch, segment: int) -> float:
        """Messages inside a tensor-parallel group: a gather before qkv and mlp, a scatter after proj and mlp.

        Embedding, norms and head have all they need of their share of the tokens, unless the vocabulary is divided.
        """
        if self.tensor_parallel == 1 or self.tensor_link is None:
            return 0.0
        share = (self.tensor_parallel - 1) / self.tensor_parallel
        nbytes = batch.tokens(segment) / self.context_parallel * self.shape.hidden * self.element_bytes * share
        about = self.shape.about(part)
        messages = about.exchanges + about.vocabulary_exchanges * self.vocabulary_divided
        return messages * self.tensor_link.seconds(nbytes)

    def _ring_s(self, part: Part, batch: Batch, segment: int, backward: bool) -> float:
        """Keys and values of a segment and of all before it that it sees, once around the context-parallel group."""
        ranks = self.context_parallel
        if ranks == 1 or self.context_link is None:
            return 0.0
        window = self.shape.window_of(part.layer)
        earlier = sum(batch.tail(s, window) for s in batch.seen(segment, window))
        tokens = batch.microbatch_size * (earlier + batch.segment_lengths[segment])
        elements = 2 * tokens * self.shape.kv_size / self.tensor_parallel * (ranks - 1) / ranks
        size = self.element_bytes + (max(4, self.element_bytes) if backward else 0)
        return (ranks - 1) * self.context_link.latency_s + elements * size / self.context_link.bytes_per_s

    def _heads_s(self, batch: Batch, segment: int) -> float:
        """Tokens of q, k and v for heads, and of the output back; backward their gradients take the same ways.

        Where key heads do not divide over the ranks they are repeated first (`sequence.attention`).
        """
        ranks, shape = self.context_parallel, self.shape
        if ranks == 1 or self.context_link is None:
            return 0.0
        kv_heads = shape.kv_heads // self.tensor_parallel
        repeated = math.lcm(kv_heads, ranks) // kv_heads
        tokens = batch.tokens(segment) / ranks * (ranks - 1) / ranks / self.tensor_parallel
        there = tokens * (shape.q_size + 2 * shape.kv_size * repeated) * self.element_bytes
        return self.context_link.seconds(there) + self.context_link.seconds(tokens * shape.q_size * self.element_bytes)


def action_seconds(
    schedule: Schedule, shape: ModelShape, batches: Batch | Sequence[Batch], costs: PartCosts, keeping: Keeping
) -> Callable[[Action], float]:
    """Seconds of each action of a schedule. `batches`: one for all micro-batches, or of each its own.

    Priced once a stage, pass and segment of all micro-batches that are alike.
    """
    recomputes = keeping.recomputes
    cut = [chunks(stage, whole=not recomputes) for stage in schedule.stages]
    sorts: dict[tuple[Hashable, ...], int] = {}  # stages whose parts are alike take as long: the first one is priced
    first = [
        sorts.setdefault(tuple((part.kind, shape.alike(part)) for part in stage.parts), s)
        for s, stage in enumerate(schedule.stages)
    ]
    each = of_each(schedule, batches)
    alike = first_alike(each)
    known: dict[tuple[Hashable, str, int, int], float] = {}

    @cache
    def work(like: int, segment: int) -> Work:
        return Work(shape, each[like], segment, keeping)

    def priced(part: Part, pass_name: str, at: Work, like: int) -> float:
        """Of parts that are alike, one is priced."""
        key = shape.alike(part), pass_name, like, at.segment
        if key not in known:
            known[key] = getattr(costs, pass_name)(part, at.batch, at.segment)
        return known[key]

    @cache
    def seconds(stage: int, kind: Pass, like: int, segment: int, ahead: bool) -> float:
        at = work(like, segment)

        def total(parts: Iterable[Part], pass_name: str) -> float:
            return math.fsum(priced(part, pass_name, at, like) for part in parts)

        def again(parts: Collection[Part]) -> float:
            """Forward seconds that a recompute of a chunk runs: what it ends in is not computed where that is in slices."""
            *_, last = parts
            unread = at.slices(last)
            runs = (part for part in parts if keeping.runs_again(part) and not (part is last and unread))
            return total(runs, "forward_s")

        parts = schedule.stages[stage].parts
        if kind is Pass.F:
            return total(parts, "forward_s")
        if kind is Pass.R:
            return again(cut[stage][-1].parts) if recomputes else 0.0
        # those that run so, of opaque layers too
        in_slices = [p for part in parts for p in shape.about(part).inside(part) if at.slices(p)]
        if kind is Pass.W:
            return total(parts, "weight_s") - total(in_slices, "weight_s")
        # the backward of what runs in slices runs its forward once more
        taken = total(parts, "input_s") + total(in_slices, "forward_s")
        # and its weight gradients cannot wait for a W
        taken += total(parts if kind is Pass.B else in_slices, "weight_s")
        if recomputes:
            left = cut[stage][:-1] if ahead else cut[stage]
            taken += math.fsum(again(chunk.parts) for chunk in left)
        return taken

    placed = schedule.placed
    has_recompute = any(action.kind is Pass.R for action in placed)

    def of(action: Action) -> float:
        ahead = has_recompute and action.sibling(Pass.R) in placed
        return seconds(first[action.stage], action.kind, alike[action.microbatch], action.segment, ahead)

    return of


def accelerator_bytes(program: Program, keeping: Keeping, share: ModelShape, group: int) -> list[int]:
    """What one of the `group` accelerators of a rank sends of each message, over a link of its own; by number.

    Values are cut evenly; of parameters it sends what it holds, which is those of `share`.
    """
    held = share.parameter_elements(part for stage in program.schedule.stages for part in stage.parts)

    def sent(message: Message) -> float:
        if message.kind in (Kind.VALUES, Kind.GRADIENTS):
            return message_bytes(message, keeping) / group
        return float(sum(held[name] for name in message.names) * _element_bytes(message, keeping))

    return [math.ceil(sent(message)) for message in program.messages]


def message_bytes(message: Message, keeping: Keeping) -> int:
    """Bytes of a message, of a whole rank."""
    wider = keeping.wide_bytes - keeping.element_bytes
    return message.elements * _element_bytes(message, keeping) + (message.wide_elements * wider if wider else 0)


def _element_bytes(message: Message, keeping: Keeping) -> int:
    """Weight gradients travel in the masters' precision, all else in the run's."""
    return keeping.wide_bytes if message.kind is Kind.WEIGHT_GRADIENTS else keeping.element_bytes
