"""Stages: what one rank needs to run actions of its stages, and where values wait between them.

An edge's values wait in the mailbox until they are read: put there by the stage that made them when it is
on this rank too, or by a message. Gradients wait in the same way on their road back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.tape import Feed, Record, Tape, Tensors
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.parts import Edge, Value
from helixpipe.schedule.program import Kind, Message, Program

# what waits: forward values or gradients, of which edge, micro-batch and segment
Slot = tuple[Kind, int, int, int, int]


class Stages:
    """One step on one rank. `feeds[microbatch, segment]` are the tokens and targets; `scale` multiplies the loss."""

    def __init__(
        self,
        program: Program,
        tapes: dict[int, Tape],
        ledger: Ledger,
        feeds: dict[tuple[int, int], Feed],
        scale: float,
        training: bool,
    ) -> None:
        self.program, self.tapes, self.ledger, self.feeds = program, tapes, ledger, feeds
        self.scale, self.training = scale, training
        self.losses: dict[tuple[int, int], Tensor] = {}
        self._mailbox: dict[Slot, list[Tensor]] = {}
        self._records: dict[Action, list[Record]] = {}

    def run(self, action: Action) -> None:
        if action.kind is Pass.F:
            self._forward(action)
        else:
            self._backward(action)

    def put(self, message: Message, tensors: list[Tensor]) -> None:
        """A message's values or gradients are here."""
        self._mailbox[_slot(message)] = tensors

    def take(self, message: Message) -> list[Tensor]:
        """The values or gradients that a message carries away."""
        return self._mailbox.pop(_slot(message))

    def _forward(self, action: Action) -> None:
        stage, _, mb, seg = action
        schedule, feed = self.program.schedule, self.feeds[mb, seg]
        inputs: Tensors = {}
        for edge in schedule.edges_into[stage]:
            inputs.update(zip(edge.values, self._mailbox.pop(_edge_slot(Kind.VALUES, edge, mb, seg)), strict=True))
        if self.training:
            values, self._records[action] = self.tapes[stage].forward(inputs, feed)
        else:
            values = self.tapes[stage].evaluate(inputs, feed)
        for edge in schedule.edges_out_of[stage]:
            self._mailbox[_edge_slot(Kind.VALUES, edge, mb, seg)] = [values[value] for value in edge.values]
        if (loss := _loss(schedule.layers)) in values:
            self.losses[mb, seg] = values[loss]

    def _backward(self, action: Action) -> None:
        stage, _, mb, seg = action
        schedule = self.program.schedule
        gradients: Tensors = {}
        for edge in schedule.edges_out_of[stage]:
            waiting = self._mailbox.pop(_edge_slot(Kind.GRADIENTS, edge, mb, seg))
            for value, gradient in zip(edge.values, waiting, strict=True):
                gradients[value] = gradients[value] + gradient if value in gradients else gradient
        if (mb, seg) in self.losses and _loss(schedule.layers) in schedule.stages[stage].parts[-1].makes:
            loss = self.losses[mb, seg]
            gradients[_loss(schedule.layers)] = torch.full_like(loss, self.scale)
        records = self._records.pop(action.sibling(Pass.F))
        gradients = self.tapes[stage].backward(records, gradients, self.feeds[mb, seg])
        for edge in schedule.edges_into[stage]:
            self._mailbox[_edge_slot(Kind.GRADIENTS, edge, mb, seg)] = [gradients[value] for value in edge.values]


def _loss(layers: int) -> Value:
    return Value("loss", layers)


def _edge_slot(kind: Kind, edge: Edge, microbatch: int, segment: int) -> Slot:
    return kind, edge.producer, edge.consumer, microbatch, segment


def _slot(message: Message) -> Slot:
    assert message.producer is not None
    assert message.consumer is not None
    first, second = message.producer, message.consumer
    if message.kind is Kind.GRADIENTS:  # the edge keeps its direction, its gradient goes against it
        first, second = second, first
    return message.kind, first.stage, second.stage, first.microbatch, first.segment
