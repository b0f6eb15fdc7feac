"""Profiling: times every kind of part as a run runs it: the same tape, ledger, mailbox, weights and clock.

    one layer, embed and head, each part a stage of its own, on one rank:

    F      embed norm qkv attn proj mlp head   of segment 0, then 1, ...    with a graph
    I, W   head ... embed                      of the last segment first    gradients of inputs; of linear layers' weights

Sequences of several lengths, whole and cut, take turns; a part's time is its median over the rounds. Several
ranks measure at once, since they slow each other down as in a run; two of them time messages between them.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from helixpipe.errors import ConfigError, HelixpipeError, RankError
from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.curves import Size, fit
from helixpipe.predict.hardware import Link
from helixpipe.predict.profile import WITH_WEIGHTS, Profile, Timing, merged, of_one_window
from helixpipe.runtime.executor import execute
from helixpipe.runtime.modules import Modules
from helixpipe.runtime.oom import out_of_memory
from helixpipe.runtime.recorder import Recorder
from helixpipe.runtime.stages import Stages
from helixpipe.runtime.tape import Feed, Tape
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.runtime.weights import Weights
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.sequence.wire import wire_of

Cut = tuple[int, ...]
"""Lengths of a sequence's segments, in tokens."""
SHORTEST = 16
WARMUP = 2
PING_BYTES = (2**12, 2**16, 2**19, 2**21, 2**23)
PINGS = 9
CARRIED_BYTES, COMPUTED_S = 2**23, 0.03
"""Of each message that travels beside computing, and how long a rank computes at least."""
TIMEOUT_S = 600.0


def default_cuts(shape: ModelShape, length: int) -> tuple[Cut, ...]:
    """Whole sequences of an eighth of `length` up to all of it; cut ones, where attention is causal."""
    if length < 2 * SHORTEST:
        raise ConfigError(f"--sequence-length: {length} tokens tell nothing; give at least {2 * SHORTEST}")
    if shape.positions == "learned" and length > shape.context:
        raise ConfigError(
            f"--sequence-length: {length} tokens, and learned positions have room for {shape.context}; shorten it or raise --context"
        )
    whole = tuple((size,) for size in sorted({max(SHORTEST, length // n) for n in (8, 4, 2, 1)}))
    cut = tuple((length // n,) * n for n in (2, 4, 8) if length // n >= SHORTEST) if shape.causal else ()
    return whole + cut


def measure(
    shape: ModelShape,
    device: torch.device | str,
    dtype: torch.dtype,
    cuts: Sequence[Cut],
    rounds: int = 5,
    before: Callable[[], object] = lambda: None,
) -> Profile:
    """Time the parts of a shape here; seconds are medians over the rounds. No process group is needed.

    `before` is called before every sequence: a barrier, where ranks are to measure at once.
    """
    parts = Parts(shape, device, dtype)
    found: list[Timing] = []
    for turn in range(-WARMUP, rounds):
        for cut in (*cuts[turn % len(cuts) :], *cuts[: turn % len(cuts)]):
            before()
            found += [timing for timing in parts.run(cut) if turn >= 0]
    return parts.profile(found)


class Parts:
    """One layer, embed and head on this device, part by part."""

    def __init__(self, shape: ModelShape, device: torch.device | str, dtype: torch.dtype) -> None:
        device, shape = torch.device(device), replace(of_one_window(shape), frozen=(), lora=None)  # every pass is timed
        self.asked, self.device, self.dtype = shape, device, dtype
        self.shape = replace(
            shape, layers=1, embed_norm=False
        )  # a norm is timed as that of the layer, which has one then
        self.stages = tuple(Stage((part,)) for part in chain(1))
        self.weights = Weights(Modules(Decoder(self.shape), self._schedule(1), 0, device, dtype))
        self.ledger = self.weights.ledger
        outputs = self._schedule(1).outputs
        self.tapes = {
            s: Tape(stage, self.weights.modules, "none", self.ledger, outputs[s]) for s, stage in enumerate(self.stages)
        }
        self.recorder, self.watch = Recorder(device), Watch(None, 0, 1)
        self.transport = Transport(None, device, dtype, self.weights.master_dtype, TIMEOUT_S, self.watch, self.ledger)

    def run(self, cut: Cut) -> Iterator[Timing]:
        """One sequence forward and backward: a timing of every action."""
        program = lower(self._schedule(len(cut)), self.shape, Batch(1, cut))
        stages = Stages(program, self.tapes, self.weights, self.ledger, self._feeds(cut), 1.0, training=True)
        execute(program.ranks[0], stages, self.weights, self.transport, self.recorder, self.watch)
        for span in self.recorder.spans():
            stage, run, _, segment = span.action
            (part,) = self.stages[stage].parts
            if run is Pass.W and part.kind not in WITH_WEIGHTS:
                continue  # nothing was put off
            seconds = max(span.end_s - span.start_s, sys.float_info.min)
            yield Timing(part.kind, run, cut[segment], sum(cut[:segment]), seconds)

    def profile(self, found: Sequence[Timing]) -> Profile:
        """What several runs timed, as their medians."""
        seconds: dict[tuple[str, Pass, int, int], list[float]] = {}
        for timing in found:
            seconds.setdefault(timing[:4], []).append(timing.seconds)
        timings = tuple(Timing(*which, statistics.median(each)) for which, each in seconds.items())
        name, version = str(self.dtype).removeprefix("torch."), torch.__version__.split("+")[0]
        threads = torch.get_num_threads()
        device = device_name(self.device)
        return Profile(self.asked, device, name, threads, 1, version, timings, device_type=self.device.type)

    def _schedule(self, segments: int) -> Schedule:
        stages = range(len(self.stages))
        order = [Action(stage, Pass.F, 0, segment) for segment in range(segments) for stage in stages]
        for segment in reversed(range(segments)):
            for stage in reversed(stages):
                order += [Action(stage, run, 0, segment) for run in (Pass.I, Pass.W)]
        return Schedule(self.stages, (tuple(order),))

    def _feeds(self, cut: Cut) -> dict[tuple[int, int], Feed]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.shape.vocabulary, (1, sum(cut)), generator=generator).to(self.device)
        pieces = tokens.split(cut, 1)
        return {(0, i): Feed(piece, piece, sum(cut[:i]), i, sequence_length=sum(cut)) for i, piece in enumerate(pieces)}


def measure_link(device: torch.device | str) -> Link:
    """Time messages between ranks 0 and 1 of the process group; collective, and the same on all."""
    wire = wire_of(dist.group.WORLD, torch.device(device))
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    points = []
    for nbytes in PING_BYTES if rank < 2 else ():
        message = torch.zeros(nbytes, dtype=torch.uint8, device=wire)
        seconds = []
        for _ in range(PINGS):
            _synchronise(wire)
            begun = time.perf_counter()
            for turn in (0, 1):
                if rank == turn:
                    dist.send(message, other)
                else:
                    dist.recv(message, other)
            _synchronise(wire)
            seconds.append((time.perf_counter() - begun) / 2)
        points.append((Size(1, nbytes), statistics.median(seconds)))
    prices = fit(points, ("start", "tokens")).prices_s if points else {}  # a token of it is a byte
    found = torch.tensor([prices.get("start", 0.0), prices.get("tokens", 0.0)], dtype=torch.float64, device=wire)
    dist.broadcast(found, 0)
    latency_s, byte_s = found.tolist()
    source = f"ping-pong between two ranks of this machine over {dist.get_backend()}"
    host_s = _host_s_per_byte(max(COMPUTED_S, 6 * CARRIED_BYTES * byte_s)) if wire.type == "cpu" else 0.0
    return Link("measured", 1 / byte_s if byte_s else float(sys.maxsize), latency_s, source, host_s_per_byte=host_s)


def _host_s_per_byte(computed_s: float) -> float:
    """What computing loses to a byte that ranks 0 and 1 send or receive meanwhile, the mean of both; collective.

    A message is put together of several tensors and received in a place of its own, as in a run. Nothing is lost where other
    cores than those that compute do all of that. `computed_s`: longer than the messages travel.
    """
    rank, lost = dist.get_rank(), torch.zeros(1, dtype=torch.float64)
    matrix, pieces = torch.ones(512, 512), [torch.ones(CARRIED_BYTES // 16) for _ in range(4)]
    times = max(1, round(computed_s / min(_computing_s(matrix, 1) for _ in range(PINGS))))
    found = []
    for _ in range(PINGS):
        dist.barrier()
        alone_s = _computing_s(matrix, times)
        dist.barrier()
        if rank < 2:
            begun = time.perf_counter()
            out, into = torch.cat(pieces), torch.empty(CARRIED_BYTES // 4)
            works = [dist.isend(out, 1 - rank), dist.irecv(into, 1 - rank)]
            _computing_s(matrix, times)
            for work in works:
                if work is not None:
                    work.wait()
            found.append((time.perf_counter() - begun - alone_s) / (2 * CARRIED_BYTES))
    if rank < 2:
        lost += max(0.0, statistics.median(found)) / 2
    dist.all_reduce(lost)
    return float(lost)


def _computing_s(matrix: Tensor, times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        torch.mm(matrix, matrix)
    return time.perf_counter() - begun


@dataclass(frozen=True)
class Asked:
    """What `measure_machine` is to measure."""

    shape: ModelShape
    device: str
    """cpu or cuda; each rank has a CUDA device of its own."""
    dtype: str
    cuts: tuple[Cut, ...]
    rounds: int
    threads: int
    told: bool = False
    """Whether rank 0 tells its progress on standard error."""


def measure_machine(asked: Asked, ranks: int) -> Profile:
    """Time parts on so many local ranks at once, and the link between two. Raises HelixpipeError."""
    if ranks == 1:
        torch.set_num_threads(asked.threads)
        return _measure_as_asked(asked, 0, lambda: None)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = spawn(_rank, (ranks, store.port, asked), nprocs=ranks, join=False, daemon=True)
    try:
        while not workers.join(timeout=1.0):
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        if store.check(["fault"]):
            raise HelixpipeError(store.get("fault").decode()) from None
        why = str(error).strip().splitlines()[-1]
        raise RankError(f"rank {error.error_index} of the measurement ended: {why}") from None
    finally:
        for process in workers.processes:
            process.kill()
            process.join()
    profiles = [Profile.from_json(store.get(f"profile/{rank}").decode()) for rank in range(ranks)]
    return merged(profiles, profiles[0].link)


def _rank(rank: int, ranks: int, port: int, asked: Asked) -> None:
    """One of the processes that measure at once."""
    torch.set_num_threads(asked.threads)
    timeout = timedelta(seconds=TIMEOUT_S)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    backend = "nccl" if asked.device == "cuda" else "gloo"
    if asked.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=ranks, timeout=timeout)
    try:
        profile = _measure_as_asked(asked, rank, dist.barrier)
    except HelixpipeError as error:
        store.set("fault", str(error))
        raise
    link = measure_link(_device(asked.device, rank))
    store.set(f"profile/{rank}", replace(profile, link=link).to_json())
    dist.barrier()
    dist.destroy_process_group()


def _measure_as_asked(asked: Asked, rank: int, together: Callable[[], Any]) -> Profile:
    done, rounds = 0, asked.rounds + WARMUP

    def before() -> None:
        nonlocal done
        if asked.told and rank == 0 and done % len(asked.cuts) == 0:
            print(f"measuring: round {done // len(asked.cuts) + 1} of {rounds}", file=sys.stderr, flush=True)
        done += 1
        together()

    try:
        dtype = getattr(torch, asked.dtype)
        return measure(asked.shape, _device(asked.device, rank), dtype, asked.cuts, asked.rounds, before)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        longest = max(map(sum, asked.cuts))
        raise HelixpipeError(
            f"out of memory at {longest:,} tokens on {asked.device}: lower --sequence-length; longer ones are extrapolated"
        ) from None


def device_name(device: torch.device | str) -> str:
    """The accelerator's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or os.name


def _device(kind: str, rank: int) -> str:
    return f"cuda:{rank}" if kind == "cuda" else kind


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
