"""Stages: what one rank needs to run actions of its stages, and where values wait between them.

An edge's values wait in the mailbox until they are read: put there by the stage that made them when it is
on this rank too, or by a message. Gradients wait in the same way on their road back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helixpipe.model.attention import KeyValues
from helixpipe.parts.part import Value, loss_of
from helixpipe.parts.work import Batch
from helixpipe.runtime.ledger import Kept, Ledger
from helixpipe.runtime.live import Live, Needs
from helixpipe.runtime.losses import bucketed
from helixpipe.runtime.randomness import Stream
from helixpipe.runtime.tape import Feed, Gradients, Record, Tape, Waiting
from helixpipe.runtime.weights import Weights
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.program import Kind, Message, Program
from helixpipe.schedule.stage import Edge

# what waits: forward values or gradients, of which edge, micro-batch and segment
Slot = tuple[Kind, int, int, int, int]


class Stages:
    """One step on one rank. `feeds[microbatch, segment]` are the tokens and targets; `scale` multiplies the loss."""

    def __init__(
        self,
        program: Program,
        tapes: dict[int, Tape],
        weights: Weights,
        ledger: Ledger,
        feeds: dict[tuple[int, int], Feed],
        scale: float,
        training: bool,
        needs: Callable[[int, int], Needs] | None = None,
        streams: Callable[[int, int], Stream] | None = None,
    ) -> None:
        """By micro-batch and segment: `needs`, what parts need; `streams`, where random numbers come from."""
        self.program, self.tapes, self.weights, self.ledger = program, tapes, weights, ledger
        self.feeds, self._needs, self._streams = feeds, needs, streams
        self.scale, self.training = scale, training
        self.losses: dict[tuple[int, int], Tensor] = {}
        """By micro-batch and segment: a sum, or of an evaluation the sums by bucket of positions, where the head tells."""
        self._mailbox: dict[Slot, list[Kept]] = {}
        self._records: dict[Action, list[Record]] = {}
        self._waiting: dict[Action, Waiting] = {}
        self._key_values: dict[int, KeyValuesByLayer] = {}
        self._fed: dict[tuple[int, int], Feed] = {}

    def run(self, action: Action) -> None:
        match action.kind:
            case Pass.F:
                self._forward(action)
            case Pass.B | Pass.I:
                self._backward(action)
            case Pass.W:
                for weight, x, gradient in self._waiting.pop(action.sibling(Pass.I)):
                    self.weights.multiply_in(weight, x.tensor, gradient.tensor)
            case Pass.R:
                records = self._records[action.sibling(Pass.F)]
                self.tapes[action.stage].recompute(records, self._feed(action))

    def put(self, message: Message, tensors: list[Tensor]) -> None:
        """A message's values or gradients are here."""
        kept = self._mailbox[_slot(message)] = [self.ledger.keep(tensor) for tensor in tensors]
        for each in kept:
            each.is_own = True

    def take(self, message: Message) -> list[Tensor]:
        """The values or gradients that a message carries away."""
        return [kept.tensor for kept in self._mailbox.pop(_slot(message))]

    def _feed(self, action: Action) -> Feed:
        """An action's feed, with the keys and values of earlier segments where there are any: the same for all of a segment."""
        mb, seg = action.microbatch, action.segment
        if (mb, seg) in self._fed:
            return self._fed[mb, seg]
        past = None
        if self.program.schedule.segments > 1:
            past = self._key_values.setdefault(mb, KeyValuesByLayer(self.ledger, self.feeds[mb, seg].batch))
        needs = self._needs(mb, seg) if self._needs else None
        stream = self._streams(mb, seg) if self._streams else None
        more: dict[str, Any] = {"microbatch": mb, "by_token": not self.training}
        found = replace(self.feeds[mb, seg], key_values=past, needs=needs, stream=stream, **more)
        self._fed[mb, seg] = found
        return found

    def _forward(self, action: Action) -> None:
        stage, _, mb, seg = action
        schedule, feed = self.program.schedule, self._feed(action)
        live = Live(self.ledger)
        for edge in schedule.edges_into[stage]:
            waiting = self._mailbox.pop(_edge_slot(Kind.VALUES, edge, mb, seg))
            for value, kept in zip(edge.values, waiting, strict=True):
                live.put(value, kept.tensor, kept)
            del waiting, kept
        if self.training:
            self._records[action] = self.tapes[stage].forward(live, feed)
        else:
            self.tapes[stage].evaluate(live, feed)
        if (loss := loss_of(schedule.layers)) in live:
            found = live.pop(loss).tensor
            self.losses[mb, seg] = bucketed(found, feed.start, feed.sequence_length) if found.dim() else found
        outputs = {value: live.pop(value) for value in list(live)}
        for edge in schedule.edges_out_of[stage]:
            meets = schedule.placement[edge.consumer, mb] == schedule.placement[stage, mb]
            self._mailbox[_edge_slot(Kind.VALUES, edge, mb, seg)] = self._waiting_for(edge, outputs, meets)
        if not self.training and seg == schedule.segments - 1:  # no backward will let them go
            for part in schedule.stages[stage].parts:
                if part.about.attends and mb in self._key_values:
                    self._key_values[mb].pop(part.layer, None)
        elif not self.training:  # and no later segment sees what is out of its window
            for part in schedule.stages[stage].parts:
                if part.about.attends and part.layer in self._key_values.get(mb, {}):
                    self._key_values[mb][part.layer].forget(seg, self.program.shape.window_of(part.layer))

    def _backward(self, action: Action) -> None:
        stage, _, mb, seg = action
        schedule = self.program.schedule
        gradients: Gradients = {}
        for edge in schedule.edges_out_of[stage]:
            waiting = self._mailbox.pop(_edge_slot(Kind.GRADIENTS, edge, mb, seg))
            for value, gradient in zip(edge.values, waiting, strict=True):
                gradients[value] = self._sum(gradients[value], gradient) if value in gradients else gradient
            del waiting, gradient
        if (mb, seg) in self.losses and loss_of(schedule.layers) in schedule.outputs[stage]:
            scale = torch.full_like(self.losses[mb, seg], self.scale)
            gradients[loss_of(schedule.layers)] = self.ledger.keep(scale)
        records, feed = self._records.pop(action.sibling(Pass.F)), self._feed(action)
        if action.kind is Pass.I:
            self._waiting[action] = self.tapes[stage].input_backward(records, gradients, feed)
        else:
            self.tapes[stage].backward(records, gradients, feed)
        for edge in schedule.edges_into[stage]:
            meets = schedule.placement[edge.producer, mb] == schedule.placement[stage, mb]
            self._mailbox[_edge_slot(Kind.GRADIENTS, edge, mb, seg)] = self._waiting_for(edge, gradients, meets)

    def _sum(self, first: Kept, second: Kept) -> Kept:
        """Of two gradients of one value; in the place of one that came in a message, which nobody else holds."""
        for into, other in ((first, second), (second, first)):
            if into.is_own:
                into.tensor.add_(other.tensor)
                return into
        made = self.ledger.keep(first.tensor + second.tensor)
        made.is_own = True
        return made

    def _waiting_for(self, edge: Edge, made: Mapping[Value, Kept], meets: bool) -> list[Kept]:
        """What an edge carries: kept for a stage of this rank, or in transit from here on."""
        found = [made[value] for value in edge.values]
        return found if meets else [self.ledger.carry(each.tensor) for each in found]


class KeyValuesByLayer(dict[int, KeyValues]):
    """Of one micro-batch: made when a layer first asks."""

    def __init__(self, ledger: Ledger, batch: Batch | None) -> None:
        """`batch`: the micro-batch, whole, where its sequences hold several documents."""
        self._ledger, self._batch = ledger, batch

    def __missing__(self, layer: int) -> KeyValues:
        self[layer] = KeyValues(self._ledger.keep, batch=self._batch)
        return self[layer]


def _edge_slot(kind: Kind, edge: Edge, microbatch: int, segment: int) -> Slot:
    return kind, edge.producer, edge.consumer, microbatch, segment


def _slot(message: Message) -> Slot:
    assert message.producer is not None
    assert message.consumer is not None
    first, second = message.producer, message.consumer
    if message.kind is Kind.GRADIENTS:  # the edge keeps its direction, its gradient goes against it
        first, second = second, first
    return message.kind, first.stage, second.stage, first.microbatch, first.segment
