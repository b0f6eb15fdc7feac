"""The executor: one rank carries out its part of a program.

      Receive    1 make room for a message, start to receive it
      Run        2 wait for the messages the action needs, hand them to its stage
                 3 run the action
      Send       4 hand what an action made to the transport
      Accumulate 5 add weight gradients that came home

Nothing here knows a schedule: what runs, what is sent and when was decided in lowering.
"""

from __future__ import annotations

from torch import Tensor

from helixpipe.runtime.recorder import Recorder
from helixpipe.runtime.stages import Stages
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.runtime.weights import Weights
from helixpipe.schedule.program import Accumulate, Instruction, Kind, Message, Receive, Run, Send, leaving


def execute(
    instructions: tuple[Instruction, ...],
    stages: Stages,
    weights: Weights,
    transport: Transport,
    recorder: Recorder,
    watch: Watch,
) -> None:
    """One step of one rank, in the program's order. Returns when its last send is complete."""
    weights.begin()
    leaves = leaving(instructions)
    recorder.start()
    for instruction in instructions:
        watch.doing = instruction
        match instruction:
            case Receive(message):  # 1
                transport.receive(message)
            case Run(action, waits):
                recorder.asks(action)
                for message in waits:  # 2
                    _take_in(message, stages, weights, transport)
                    recorder.takes(message)
                stages.ledger.reset_high()
                stages.run(action)  # 3
                for message in leaves.get(action, ()):
                    weights.pack(message.names)
                recorder.ends(stages.ledger.high, stages.ledger.held)
            case Send(message):  # 4
                transport.send(message, _take_out(message, stages, weights))
            case Accumulate(message):  # 5
                weights.add(message.names, transport.wait(message))
    watch.doing = "the end of the step"
    transport.finish()
    weights.end()


def _take_in(message: Message, stages: Stages, weights: Weights, transport: Transport) -> None:
    tensors = transport.wait(message)
    if message.kind is Kind.WEIGHTS:
        weights.arrive(message.names, tensors)
    else:
        stages.put(message, tensors)


def _take_out(message: Message, stages: Stages, weights: Weights) -> list[Tensor]:
    if message.kind is Kind.WEIGHTS:
        return weights.outgoing(message.names)
    if message.kind is Kind.WEIGHT_GRADIENTS:
        return weights.leave(message.names)
    return stages.take(message)
