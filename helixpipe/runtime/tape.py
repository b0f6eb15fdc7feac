"""Tape: what a forward keeps for its backward, under a recompute policy.

    none        the autograd graph as it is
    full        the inputs; everything is recomputed
    selective   the inputs, and attention's output and log-sum-exp: recomputation without attention
                (HelixPipe, section 4.4)

A stage runs as chunks (`schedule.chunks`), each about a layer. Each chunk keeps its own inputs, and the
backward recomputes and differentiates one chunk at a time:

    forward    in -> [chunk 0] -> keep -> [chunk 1] -> keep -> [chunk 2] -> out
    backward   recompute 2, differentiate 2, let go; recompute 1, ...     the transient is one chunk's

A chunk whose graph keeps next to nothing (`Kind.graphed`) keeps it under every policy, and none of its inputs.
A value is dropped as soon as its last reader has run, a gradient as soon as its maker's backward has. A recomputed graph
keeps less than one that waits (`runtime.lean`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from helixpipe.model.attention import AttentionState, KeptAttention, KeyValues
from helixpipe.model.attn import Attention
from helixpipe.model.block import Block
from helixpipe.model.chunked import unread
from helixpipe.model.function import Function, Holder, active
from helixpipe.model.head import takes_weights
from helixpipe.model.linear import Linear, WeightQueue
from helixpipe.model.norm import RMSNorm
from helixpipe.model.qkv import QKV
from helixpipe.model.rope import Start
from helixpipe.parts.part import Part, Value
from helixpipe.parts.work import Batch
from helixpipe.runtime.lean import Lean
from helixpipe.runtime.ledger import Kept, Ledger
from helixpipe.runtime.live import Live, Needs
from helixpipe.runtime.nonfinite import Probe, edges
from helixpipe.runtime.randomness import Stream, may_draw
from helixpipe.schedule.chunks import Chunk, chunks
from helixpipe.schedule.stage import Stage

POLICIES = ("none", "full", "selective")
Gradients = dict[Value, Kept]
Waiting = list[tuple[nn.Parameter, Holder, Holder]]


@dataclass(frozen=True)
class Feed:
    """What a stage reads beside values, for one segment: tokens and targets [b, s] and where they are. `weights`, of
    targets, are [b, s] too; None: all weigh 1.

    `needs`: what its parts need while they run. `key_values` are those of earlier segments, by layer; None when the
    sequence is whole. `gathered_start`: where the tokens of q, k and v are, when tensor parallelism gathers more than are
    here; None: where these are. `sequence_length`: of the whole sequence, all segments on all ranks; 0: not known.
    """

    tokens: Tensor
    targets: Tensor
    start: Start = 0
    segment: int = 0
    key_values: Mapping[int, KeyValues] | None = None
    gathered_start: Start | None = None
    sequence_length: int = 0
    needs: Needs | None = None
    stream: Stream | None = None
    weights: Tensor | None = None
    by_token: bool = False
    """Whether a head that knows the loss of each token gives these, as in evaluations, and not their sum."""
    batch: Batch | None = None
    """The micro-batch, whole, where its sequences hold several documents; None: each is one."""
    microbatch: int = 0
    """Its number on this replica."""

    @property
    def attended(self) -> Start:
        return self.start if self.gathered_start is None else self.gathered_start


@dataclass
class Record:
    """What one chunk keeps: its inputs and attention, or its graph as the edge to start at and the leaves to end at."""

    inputs: Mapping[Value, Kept] = field(default_factory=dict)
    attention: tuple[Kept, Kept] | None = None
    root: GradientEdge | None = None
    leaves: dict[Value, Tensor] | None = None
    """None while there is no graph."""
    gradients: dict[Value, Tensor] = field(default_factory=dict)
    """What the root hands to the chunk's outputs."""


class Tape:
    """Runs one stage forward and backward on this rank. `outputs` are the values that leave the stage."""

    def __init__(
        self,
        stage: Stage,
        modules: Mapping[Part, nn.Module],
        policy: str,
        ledger: Ledger,
        outputs: Sequence[Value] | frozenset[Value],
        collect: Callable[[nn.Parameter, Tensor, Tensor], None] | None = None,
        splits: bool = True,
    ) -> None:
        """`collect`: see `WeightQueue`. `splits`: whether it may be asked for an input backward alone."""
        self.stage, self.modules, self.policy, self.ledger = stage, modules, policy, ledger
        self._splits = splits
        self.chunks = chunks(stage, policy == "none", outputs)
        self.queue = WeightQueue(ledger.keep, collect)
        self._calls = {part: _Call(modules[part], part.reads, part.makes, part.about.attends) for part in stage.parts}
        self.probe: Probe | None = None
        """Looks for values that are not finite, where it is set."""
        self._draws = {part for part in stage.parts if may_draw(modules[part])}
        for part in stage.parts:
            for module in modules[part].modules():
                if isinstance(module, Linear | RMSNorm | Attention):
                    module.queue = self.queue

    def forward(self, live: Live, feed: Feed) -> list[Record]:
        """One record per chunk. `live` holds the stage's inputs before, and its outputs after."""
        return [
            self._graph(c, live, feed, None) if self.policy == "none" or c.graphed else self._keep(c, live, feed)
            for c in self.chunks
        ]

    def evaluate(self, live: Live, feed: Feed) -> None:
        """The same, and nothing is kept."""
        with torch.no_grad():
            for chunk in self.chunks:
                self._run(chunk, live, feed, None)

    def recompute(self, records: list[Record], feed: Feed) -> None:
        """Do ahead what the backward would do first: recompute the last chunk."""
        if records[-1].leaves is None:
            records[-1] = self._recompute(self.chunks[-1], records[-1], feed)

    def input_backward(self, records: list[Record], gradients: Gradients, feed: Feed) -> Waiting:
        """`backward`, with the weight gradients of linear layers put off: these are returned."""
        self.queue.open = True
        try:
            self.backward(records, gradients, feed)
            return self.queue.take()
        finally:
            self.queue.open = False

    def backward(self, records: list[Record], gradients: Gradients, feed: Feed) -> None:
        """`gradients` holds those of the stage's outputs before, of its inputs after; parameters collect their own."""
        for chunk in reversed(self.chunks):
            record = records.pop()
            if record.leaves is None:
                record = self._recompute(chunk, record, feed)
            assert record.leaves is not None
            for value in chunk.gives:
                if value in gradients:
                    record.gradients[value] = gradients.pop(value).tensor
            if record.root is not None:
                with self.ledger.graphs():  # a chunked part builds its graphs here
                    torch.autograd.backward([record.root])  # it reads no gradient; a given one makes torch import sympy
            for value, leaf in record.leaves.items():
                gradient = (
                    torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if leaf.grad is None else leaf.grad
                )
                if value in gradients:  # a later chunk reads it too
                    gradient = gradients[value].tensor + gradient
                gradients[value] = self.ledger.keep(gradient)
                leaf.grad = None

    def _keep(self, chunk: Chunk, live: Live, feed: Feed) -> Record:
        """Run without a graph; keep the inputs, and attention's output when that is the policy."""
        kept = KeptAttention() if self.policy == "selective" else None
        inputs = {value: self.ledger.keep(live[value]) for value in chunk.reads}
        with torch.no_grad():
            self._run(chunk, live, feed, kept)
        attention = None
        if kept is not None and kept.out is not None and kept.lse is not None:
            attention = self.ledger.keep(kept.out), self.ledger.keep(kept.lse)
        return Record(inputs, attention)

    def _recompute(self, chunk: Chunk, record: Record, feed: Feed) -> Record:
        """The graph that a forward under `none` would have kept."""
        live = Live(self.ledger)
        for value, held in record.inputs.items():
            live.put(value, held.tensor, held)
        attention = None
        if record.attention is not None:
            attention = KeptAttention(record.attention[0].tensor, record.attention[1].tensor)
        # what the chunk ends in was read by the next one, in the forward
        with unread(self.modules[chunk.parts[-1]]):
            return self._graph(chunk, live, feed, attention, Lean(chunk, self.modules, self.ledger, self.queue))

    def _graph(
        self, chunk: Chunk, live: Live, feed: Feed, kept: KeptAttention | None, lean: Lean | None = None
    ) -> Record:
        """Run with a graph. Only the edge of its root is kept: what no operation saved may go."""
        inside = Live(self.ledger)
        leaves = {value: live[value].detach().requires_grad_() for value in chunk.reads}
        for value, leaf in leaves.items():
            inside.put(value, leaf)
        live.drop(value for drops in chunk.lifetimes.drops for value in drops)
        with torch.enable_grad(), self.ledger.graphs():
            self._run(chunk, inside, feed, kept, True, lean)
        record = Record(leaves=leaves)
        outputs = [value for value in chunk.gives if inside[value].requires_grad]
        if outputs:
            root: Tensor = _Root.apply(record.gradients, outputs, *inside.read(outputs))
            record.root = get_gradient_edge(root)
        for value in chunk.gives:
            held = inside.pop(value)
            live.put(value, held.tensor, held)
        for leaf in leaves.values():  # the leaf is there to collect a gradient; its data is on the ledger if needed
            leaf.data = leaf.data.new_empty(1).expand(leaf.shape)
        return record

    def _run(
        self,
        chunk: Chunk,
        live: Live,
        feed: Feed,
        kept: KeptAttention | None,
        graph: bool = False,
        lean: Lean | None = None,
    ) -> None:
        for place, part in enumerate(chunk.parts):
            if lean is None:
                self._run_part(chunk, place, live, feed, kept, graph, None)
            else:
                with lean.keeping(place, live):
                    self._run_part(chunk, place, live, feed, kept, graph, lean)
            is_replayed = graph and kept is not None and self._calls[part].attends
            if feed.needs is not None and not is_replayed:
                self.ledger.works(feed.needs.forward_bytes(part, graph))
            live.drop(chunk.lifetimes.drops[place])

    def _run_part(
        self,
        chunk: Chunk,
        place: int,
        live: Live,
        feed: Feed,
        kept: KeptAttention | None,
        graph: bool,
        lean: Lean | None,
    ) -> None:
        part = chunk.parts[place]
        module, reads, makes, _ = self._calls[part]
        inputs, in_place = live.read(reads), lean is not None and lean.in_place(place)
        read = edges(inputs) if self.probe is not None and graph else []
        if feed.stream is not None and part in self._draws:
            with feed.stream.of(part, feed.tokens.device):
                made = run_part(part, module, inputs, feed, kept, in_place)
        else:
            made = run_part(part, module, inputs, feed, kept, in_place)
        if graph:  # what follows may count on it, whatever is frozen before
            made = [each if each.requires_grad else each.detach().requires_grad_() for each in made]
        if feed.needs is not None:
            feed.needs.check(part, module, made, feed.targets.shape if feed.by_token else ())
            nbytes = feed.needs.backward_bytes(chunk, place, self._splits) if graph else 0
            if nbytes and made[-1].requires_grad:
                _before_backward(made[-1], partial(_works, self.ledger, nbytes))
        if self.probe is not None:
            if lean is None:  # what a recompute makes was seen, and may be a stand-in that nobody reads
                self.probe.made(part, feed.microbatch, feed.segment, made)
            if graph:
                self.probe.follow(part, feed.microbatch, feed.segment, read, made)
        for value, tensor in zip(makes, made, strict=True):
            live.put(value, tensor)


class _Call(NamedTuple):
    """What running a part asks of it, looked up once."""

    module: nn.Module
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]
    attends: bool


def _before_backward(made: Tensor, works: Callable[[object], None]) -> None:
    """Call it when the backward of what made this begins. A hook of a node costs less than one of a tensor."""
    if made.grad_fn is None:
        made.register_hook(works)
    else:
        made.grad_fn.register_prehook(works)


def _works(ledger: Ledger, nbytes: int, _: object) -> None:
    ledger.works(nbytes)


class _Root(Function):
    """Where a chunk's backward starts. It hands out the gradients of outputs, so that nobody holds them longer than needed."""

    @staticmethod
    def forward(ctx: Any, gradients: dict[Value, Tensor], values: Sequence[Value], *outputs: Tensor) -> Tensor:
        ctx.gradients, ctx.values = gradients, values
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(ctx.gradients.pop(value, None) for value in ctx.values)


def run_part(
    part: Part,
    module: nn.Module,
    inputs: Sequence[Tensor],
    feed: Feed,
    kept: KeptAttention | None,
    in_place: bool = False,
) -> Sequence[Tensor]:
    """Call a part's module as the first line of its file in `model` says; what it makes, in the order of `part.makes`."""
    match part.kind:
        case "embed":
            return (module(feed.tokens, feed.start),)
        case "head":
            return (_loss(module, inputs, feed),)
        case "lookup":
            return (module(feed.tokens),)
        case "joined":
            return (module(inputs, feed.start),)
        case "logits":
            return (module(*inputs, feed.targets),)
        case "loss":
            return (_loss(module, (inputs,), feed),)
        case "qkv" if isinstance(module, QKV):
            return tuple(module(*inputs, feed.attended, feed.sequence_length))
        case "block" if isinstance(module, Block):
            return (module(*inputs, feed.attended, feed.sequence_length, AttentionState(batch=feed.batch)),)
        case "qkv":
            return tuple(module(*inputs, feed.attended))
        case "block":
            return (module(*inputs, feed.attended),)
        case "attn" if isinstance(module, Attention):
            past = None if feed.key_values is None else feed.key_values[part.layer]
            state = AttentionState(kept, past, feed.segment, in_place, feed.batch, active(module.queue))
            return (module(*inputs, state),)
        case _:
            return (module(*inputs),)


def _loss(module: nn.Module, read: Sequence[Any], feed: Feed) -> Tensor:
    """Of all tokens together; of each where the module knows it and an evaluation asks."""
    each = getattr(module, "token_losses", None) if feed.by_token else None
    loss: Tensor
    if feed.weights is None:
        loss = (each if callable(each) else module)(*read, feed.targets)
    else:
        loss = (each if callable(each) and takes_weights(each) else module)(*read, feed.targets, weights=feed.weights)
    return loss
