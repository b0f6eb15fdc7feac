"""Stages: what one rank needs to run actions of its stages, and where values wait between them.

An edge's values wait in the mailbox until they are read: put there by the stage that made them when it is
on this rank too, or by a message. Gradients wait in the same way on their road back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from helixpipe.model.attention import KeyValues
from helixpipe.parts.part import loss_of
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.tape import Feed, Record, Tape, Tensors, Waiting
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
    ) -> None:
        self.program, self.tapes, self.weights, self.ledger = program, tapes, weights, ledger
        self.feeds = feeds
        self.scale, self.training = scale, training
        self.losses: dict[tuple[int, int], Tensor] = {}
        self._mailbox: dict[Slot, list[Tensor]] = {}
        self._records: dict[Action, list[Record]] = {}
        self._waiting: dict[Action, Waiting] = {}
        self._key_values: dict[int, KeyValuesByLayer] = {}

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
        self._mailbox[_slot(message)] = tensors

    def take(self, message: Message) -> list[Tensor]:
        """The values or gradients that a message carries away."""
        return self._mailbox.pop(_slot(message))

    def _feed(self, action: Action) -> Feed:
        """An action's feed, with the keys and values of earlier segments where there are any."""
        feed = self.feeds[action.microbatch, action.segment]
        if self.program.schedule.segments == 1:
            return feed
        past = self._key_values.setdefault(action.microbatch, KeyValuesByLayer(self.ledger))
        return replace(feed, key_values=past)

    def _forward(self, action: Action) -> None:
        stage, _, mb, seg = action
        schedule, feed = self.program.schedule, self._feed(action)
        inputs: Tensors = {}
        for edge in schedule.edges_into[stage]:
            inputs.update(zip(edge.values, self._mailbox.pop(_edge_slot(Kind.VALUES, edge, mb, seg)), strict=True))
        if self.training:
            values, self._records[action] = self.tapes[stage].forward(inputs, feed)
        else:
            values = self.tapes[stage].evaluate(inputs, feed)
        for edge in schedule.edges_out_of[stage]:
            self._mailbox[_edge_slot(Kind.VALUES, edge, mb, seg)] = [values[value] for value in edge.values]
        if not self.training and seg == schedule.segments - 1:  # no backward will let them go
            for part in schedule.stages[stage].parts:
                if part.about.attends and mb in self._key_values:
                    self._key_values[mb].pop(part.layer, None)
        if (loss := loss_of(schedule.layers)) in values:
            self.losses[mb, seg] = values[loss]

    def _backward(self, action: Action) -> None:
        stage, _, mb, seg = action
        schedule = self.program.schedule
        gradients: Tensors = {}
        for edge in schedule.edges_out_of[stage]:
            waiting = self._mailbox.pop(_edge_slot(Kind.GRADIENTS, edge, mb, seg))
            for value, gradient in zip(edge.values, waiting, strict=True):
                gradients[value] = gradients[value] + gradient if value in gradients else gradient
        if (mb, seg) in self.losses and loss_of(schedule.layers) in schedule.stages[stage].parts[-1].makes:
            loss = self.losses[mb, seg]
            gradients[loss_of(schedule.layers)] = torch.full_like(loss, self.scale)
        records = self._records.pop(action.sibling(Pass.F))
        if action.kind is Pass.I:
            gradients, self._waiting[action] = self.tapes[stage].input_backward(records, gradients, self._feed(action))
        else:
            gradients = self.tapes[stage].backward(records, gradients, self._feed(action))
        for edge in schedule.edges_into[stage]:
            self._mailbox[_edge_slot(Kind.GRADIENTS, edge, mb, seg)] = [gradients[value] for value in edge.values]


class KeyValuesByLayer(dict[int, KeyValues]):
    """Of one micro-batch: made when a layer first asks."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __missing__(self, layer: int) -> KeyValues:
        self[layer] = KeyValues(self._ledger.keep)
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
