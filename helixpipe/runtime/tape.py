"""Tape: what a forward keeps for its backward, under a recompute policy.

    none        the autograd graph as it is
    full        the inputs; everything is recomputed
    selective   the inputs, and attention's output and log-sum-exp: recomputation without attention
                (HelixPipe, section 4.4)

A stage runs as chunks (`schedule.chunks`), each about a layer. Each chunk keeps its own inputs, and the
backward recomputes and differentiates one chunk at a time:

    forward    in -> [chunk 0] -> keep -> [chunk 1] -> keep -> [chunk 2] -> out
    backward   recompute 2, differentiate 2, let go; recompute 1, ...     the transient is one chunk's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from helixpipe.model.attention import AttentionState, Holder, KeptAttention, KeyValues
from helixpipe.model.attn import Attention
from helixpipe.model.chunked import unread
from helixpipe.model.linear import Linear, WeightQueue
from helixpipe.model.rope import Start
from helixpipe.parts.part import Part, Value
from helixpipe.runtime.ledger import Kept, Ledger
from helixpipe.schedule.chunks import Chunk, chunks
from helixpipe.schedule.stage import Stage

POLICIES = ("none", "full", "selective")
Tensors = dict[Value, Tensor]
Waiting = list[tuple[nn.Parameter, Holder, Holder]]


@dataclass(frozen=True)
class Feed:
    """What a stage reads beside values, for one segment: tokens and targets [b, s] and where they are.

    `key_values` are those of earlier segments, by layer; None when the sequence is whole. `gathered_start`: where
    the tokens of q, k and v are, when tensor parallelism gathers more than are here; None: where these are.
    """

    tokens: Tensor
    targets: Tensor
    start: Start = 0
    segment: int = 0
    key_values: Mapping[int, KeyValues] | None = None
    gathered_start: Start | None = None

    @property
    def attended(self) -> Start:
        return self.start if self.gathered_start is None else self.gathered_start


@dataclass
class Record:
    """What one chunk keeps: its inputs and attention, or its graph as edges to start and end at."""

    inputs: Mapping[Value, Kept]
    attention: tuple[Kept, Kept] | None
    outputs: dict[Value, GradientEdge]
    leaves: Tensors


class Tape:
    """Runs one stage forward and backward on this rank."""

    def __init__(self, stage: Stage, modules: Mapping[Part, nn.Module], policy: str, ledger: Ledger) -> None:
        self.stage, self.modules, self.policy, self.ledger = stage, modules, policy, ledger
        self.chunks = chunks(stage, whole=policy == "none")
        self.queue = WeightQueue(ledger.keep)
        for part in stage.parts:
            for module in modules[part].modules():
                if isinstance(module, Linear):
                    module.queue = self.queue

    def forward(self, inputs: Tensors, feed: Feed) -> tuple[Tensors, list[Record]]:
        """All values the stage makes, and one record per chunk."""
        values = dict(inputs)
        records = []
        for chunk in self.chunks:
            given = {value: values[value] for value in chunk.reads}
            if self.policy == "none":
                made, record = self._graph(chunk, given, feed, None)
            else:
                made, record = self._keep(chunk, given, feed)
            values.update((value, tensor.detach()) for value, tensor in made.items())
            records.append(record)
        return values, records

    def evaluate(self, inputs: Tensors, feed: Feed) -> Tensors:
        """All values the stage makes, and nothing kept."""
        values = dict(inputs)
        with torch.no_grad():
            for chunk in self.chunks:
                values |= self._run(chunk, values, feed, None)
        return values

    def recompute(self, records: list[Record], feed: Feed) -> None:
        """Do ahead what the backward would do first: recompute the last chunk."""
        if not records[-1].outputs:
            records[-1] = self._recompute(self.chunks[-1], records[-1], feed)

    def input_backward(self, records: list[Record], gradients: Tensors, feed: Feed) -> tuple[Tensors, Waiting]:
        """`backward`, with the weight gradients of linear layers put off: those, too, are returned."""
        self.queue.open = True
        try:
            return self.backward(records, gradients, feed), self.queue.take()
        finally:
            self.queue.open = False

    def backward(self, records: list[Record], gradients: Tensors, feed: Feed) -> Tensors:
        """Gradients of the stage's inputs, from those of its outputs; parameters collect their own."""
        gradients = dict(gradients)
        for chunk in reversed(self.chunks):
            record = records.pop()
            if not record.outputs:
                record = self._recompute(chunk, record, feed)
            roots = [value for value in record.outputs if value in gradients]
            with self.ledger.graphs():  # a chunked part builds its graphs here
                torch.autograd.backward([record.outputs[v] for v in roots], [gradients.pop(v) for v in roots])
            for value, leaf in record.leaves.items():
                if leaf.grad is not None:
                    gradients[value] = gradients[value] + leaf.grad if value in gradients else leaf.grad
        return gradients

    def _keep(self, chunk: Chunk, given: Tensors, feed: Feed) -> tuple[Tensors, Record]:
        """Run without a graph; keep the inputs, and attention's output when that is the policy."""
        kept = KeptAttention() if self.policy == "selective" else None
        with torch.no_grad():
            made = self._run(chunk, given, feed, kept)
        attention = None
        if kept is not None and kept.out is not None and kept.lse is not None:
            attention = self.ledger.keep(kept.out), self.ledger.keep(kept.lse)
        return made, Record({v: self.ledger.keep(t) for v, t in given.items()}, attention, {}, {})

    def _recompute(self, chunk: Chunk, record: Record, feed: Feed) -> Record:
        """The graph that a forward under `none` would have kept."""
        given = {value: kept.tensor for value, kept in record.inputs.items()}
        attention = None
        if record.attention is not None:
            attention = KeptAttention(record.attention[0].tensor, record.attention[1].tensor)
        # what the chunk ends in was read by the next one, in the forward
        with unread(self.modules[chunk.parts[-1]]):
            return self._graph(chunk, given, feed, attention)[1]

    def _graph(self, chunk: Chunk, given: Tensors, feed: Feed, kept: KeptAttention | None) -> tuple[Tensors, Record]:
        """Run with a graph. Only edges of it are kept: what no operation saved may go."""
        leaves = {value: tensor.detach().requires_grad_() for value, tensor in given.items()}
        with torch.enable_grad(), self.ledger.graphs():
            made = self._run(chunk, leaves, feed, kept)
        edges = {value: get_gradient_edge(tensor) for value, tensor in made.items() if tensor.requires_grad}
        for leaf in leaves.values():  # the leaf is there to collect a gradient; its data is on the ledger if needed
            leaf.data = leaf.data.new_empty(1).expand(leaf.shape)
        return made, Record({}, None, edges, leaves)

    def _run(self, chunk: Chunk, given: Tensors, feed: Feed, kept: KeptAttention | None) -> Tensors:
        values = dict(given)
        made: Tensors = {}
        for part in chunk.parts:
            out = run_part(part, self.modules[part], [values[value] for value in part.reads], feed, kept)
            made.update(zip(part.makes, out, strict=True))
            values.update(made)
        return made


def run_part(
    part: Part, module: nn.Module, inputs: Sequence[Tensor], feed: Feed, kept: KeptAttention | None
) -> Sequence[Tensor]:
    """Call a part's module as the first line of its file in `model` says; what it makes, in the order of `part.makes`."""
    match part.kind:
        case "embed":
            return (module(feed.tokens, feed.start),)
        case "head":
            return (module(*inputs, feed.targets),)
        case "qkv":
            return tuple(module(*inputs, feed.attended))
        case "block":
            return (module(*inputs, feed.attended),)
        case "attn" if isinstance(module, Attention):
            past = None if feed.key_values is None else feed.key_values[part.layer]
            return (module(*inputs, AttentionState(kept, past, feed.segment)),)
        case _:
            return (module(*inputs),)
