"""Emulated: the real executor, transport and processes, with stages that sleep for their modelled time.

Any schedule at any number of ranks runs on a laptop, in the time the model gives it. What is real: one process a rank,
the program's instructions in order, a message over gloo for every message, posted, awaited and let go as in training.
What is not: an action sleeps, and a message carries one element a tensor.

    src   [ action sleeps ]S----.                  a message that has come all the same waits until it may be here:
                            '===:===> here         once both ranks have posted it and both links are free, it takes its
    dst          R[ action sleeps ]...[ action     modelled seconds of the sender's way out and the receiver's way in

The links' times stand in memory that all ranks share. `time.perf_counter` is one clock for all processes of a machine
(CLOCK_MONOTONIC on Linux and macOS), so all ranks start at one agreed moment and their spans have it as their origin.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from helixpipe.errors import ConfigError
from helixpipe.predict.hardware import Communicators
from helixpipe.predict.timeline import Span, Timeline
from helixpipe.runtime.executor import execute
from helixpipe.runtime.forked import run_forked
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.recorder import Recorder
from helixpipe.runtime.stages import Stages
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.runtime.weights import Weights
from helixpipe.schedule.action import Action
from helixpipe.schedule.program import Accumulate, Instruction, Message, Program, Receive, Run, Send

CPU = torch.device("cpu")
# what every message is made of; only ever read
ELEMENT = torch.zeros(1)
# a sleep ends late by about this, so the last bit of it is waited for awake
AWAKE_S = 1e-4
# between agreeing on the start and the start, and as much more for each rank
AHEAD_S, AHEAD_PER_RANK_S = 0.05, 0.005


def rehearse(
    program: Program,
    seconds: Callable[[Action], float],
    message_seconds: Callable[[Message], float] | None = None,
    timeout_s: float = 60.0,
    communicators: Communicators = "direction",
) -> Timeline:
    """Run a program with actions that sleep; the measured timeline, without bytes.

    `seconds` of each action; `message_seconds` of each message, on top of nothing but what gloo takes for a few bytes
    (None is no more than that); `communicators`: whether those of two ranks in both directions take turns. A wait for another rank of more than `timeout_s` is a RankError, as is a rank that
    dies: it names who waited for what. No process remains. Raises ConfigError for seconds that are no time.
    """
    actions = {a: _time(seconds(a), str(a)) for order in program.schedule.ranks for a in order}
    takes = [0.0 if message_seconds is None else _time(message_seconds(m), str(m)) for m in program.messages]
    job = Rehearsal(small_instructions(program), actions, takes, timeout_s, communicators == "pair")
    return Timeline(tuple(run_forked(job)))


def small_instructions(program: Program) -> tuple[tuple[Instruction, ...], ...]:
    """The program's instructions, with messages of one element a tensor."""
    small = {message.number: replace(message, shapes=((1,),) * len(message.shapes)) for message in program.messages}
    return tuple(tuple(_with(small, each) for each in instructions) for instructions in program.ranks)


@dataclass
class Rehearsal:
    """The job of the forked ranks: `message_seconds` by the message's number."""

    instructions: tuple[tuple[Instruction, ...], ...]
    seconds: dict[Action, float]
    message_seconds: list[float]
    timeout_s: float
    takes_turns: bool = False

    @property
    def ranks(self) -> int:
        return len(self.instructions)

    @property
    def limit_s(self) -> float:
        """Were everything to happen one after another, and then a wait at the start and one at the end."""
        return sum(self.seconds.values()) + sum(self.message_seconds) + 2 * self.timeout_s

    def prepare(self) -> None:
        self._links = Links(self.message_seconds, self.ranks, self.takes_turns) if any(self.message_seconds) else None

    def run(self, rank: int, store: Store) -> tuple[Span, ...]:
        """The step of one rank: its spans, from the start that all agreed on."""
        torch.set_num_threads(1)
        timeout = timedelta(seconds=self.timeout_s)
        watch = Watch(store.clone(), rank, self.ranks)  # type: ignore[attr-defined]
        watch.doing = "meeting the others"
        with watch.together():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=self.ranks, timeout=timeout)
            start_s = _agreed_start_s(rank, self.ranks)
        transport = EmulatedTransport(self.timeout_s, watch, self._links)
        recorder = EmulatedRecorder(start_s)
        execute(
            self.instructions[rank], EmulatedStages(self.seconds), EmulatedWeights(start_s), transport, recorder, watch
        )
        with watch.together():
            dist.barrier()  # nobody leaves while others may still have to hear from it
        return recorder.spans()


class Links:
    """When messages may be there, in memory that all forked ranks share: what `simulate_program` computes, live.

    A message leaves once both sides have posted it and the sender's way out and the receiver's way in are free.
    """

    def __init__(self, message_seconds: Sequence[float], ranks: int, takes_turns: bool) -> None:
        """`takes_turns`: those of two ranks do, in both directions."""
        self._seconds, self._ranks, self._takes_turns = message_seconds, ranks, takes_turns
        sizes = (len(message_seconds), len(message_seconds), ranks, ranks, ranks**2)
        shared = memoryview(mmap.mmap(-1, 8 * sum(sizes))).cast("d")
        pieces = (shared[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))
        self._posted, self._arrives_s, self._way_out_s, self._way_in_s, self._pair_s = pieces
        self._lock = multiprocessing.get_context("fork").Lock()

    def post(self, message: Message) -> None:
        """One side has come to a message; with the second one it leaves."""
        number, src, dst = message.number, message.src, message.dst
        with self._lock:
            if not self._posted[number]:
                self._posted[number] = 1.0
                return
            leaves_s = max(time.perf_counter(), self._way_out_s[src], self._way_in_s[dst])
            pair = min(src, dst) * self._ranks + max(src, dst)
            if self._takes_turns:
                leaves_s = max(leaves_s, self._pair_s[pair])
            arrives_s = leaves_s + self._seconds[number]
            self._arrives_s[number] = self._way_out_s[src] = self._way_in_s[dst] = self._pair_s[pair] = arrives_s

    def arrives_s(self, message: Message) -> float:
        """On the machine's clock; known once both sides have posted it."""
        return self._arrives_s[message.number]


class EmulatedTransport(Transport):
    """The real one, but what has come is not handed on before its modelled time."""

    def __init__(self, timeout_s: float, watch: Watch, links: Links | None) -> None:
        """Without links messages take what they take."""
        ledger = Ledger(lambda pointer: True)  # what a rehearsal holds is nobody's activations
        super().__init__(dist.group.WORLD, CPU, torch.float32, torch.float32, timeout_s, watch, ledger)
        self._links = links

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        if self._links:
            self._links.post(message)
        super().send(message, tensors)

    def receive(self, message: Message) -> None:
        if self._links:
            self._links.post(message)
        super().receive(message)

    def wait(self, message: Message) -> list[Tensor]:
        tensors = super().wait(message)
        if self._links:
            sleep_until(self._links.arrives_s(message))
        return tensors


class EmulatedStages(Stages):
    """An action sleeps; what it makes is one element a value."""

    def __init__(self, seconds: dict[Action, float]) -> None:
        self.ledger = Ledger(lambda pointer: False)
        self._seconds = seconds

    def run(self, action: Action) -> None:
        sleep_until(time.perf_counter() + self._seconds[action])

    def put(self, message: Message, tensors: list[Tensor]) -> None:
        """Nothing reads them."""

    def take(self, message: Message) -> list[Tensor]:
        return _elements(message.names)


class EmulatedWeights(Weights):
    """Travelling weights are one element each. Holds the rank back until the start."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s

    def begin(self) -> None:
        sleep_until(self._start_s)

    def outgoing(self, names: Sequence[str]) -> list[Tensor]:
        return _elements(names)

    def arrive(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Nothing reads them."""

    def pack(self, names: Sequence[str]) -> None:
        """Nothing counts them."""

    def leave(self, names: Sequence[str]) -> list[Tensor]:
        return _elements(names)

    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Nothing reads them."""

    def end(self) -> None:
        """Nothing was collected."""


class EmulatedRecorder(Recorder):
    """Its clock starts at the moment that all ranks agreed on."""

    def __init__(self, start_s: float) -> None:
        super().__init__(CPU)
        self._agreed_s = start_s

    def start(self) -> None:
        super().start()
        self._start = self._agreed_s


def sleep_until(moment_s: float) -> None:
    """Until `time.perf_counter()` says so: asleep, and awake at the very end."""
    while (left_s := moment_s - time.perf_counter()) > AWAKE_S:
        time.sleep(left_s - AWAKE_S)
    while time.perf_counter() < moment_s:
        time.sleep(0)  # lets this process's other threads run


def _agreed_start_s(rank: int, ranks: int) -> float:
    """Rank 0's choice of a moment that is not yet."""
    dist.barrier()
    moment = torch.zeros(1, dtype=torch.float64)
    if rank == 0:
        moment.fill_(time.perf_counter() + AHEAD_S + AHEAD_PER_RANK_S * ranks)
    dist.broadcast(moment, 0)
    return float(moment)


def _elements(names: Sequence[str]) -> list[Tensor]:
    return [ELEMENT] * len(names)


def _with(small: dict[int, Message], instruction: Instruction) -> Instruction:
    """The same instruction, of the small messages."""
    match instruction:
        case Run(action, waits):
            return Run(action, tuple(small[message.number] for message in waits))
        case Send(message):
            return Send(small[message.number])
        case Receive(message):
            return Receive(small[message.number])
        case Accumulate(message):
            return Accumulate(small[message.number])


def _time(seconds: float, of: str) -> float:
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"rehearse: {of} takes {seconds} s; give finite seconds from 0 up")
    return seconds
