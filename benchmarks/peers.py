"""What benchmarks share: pinned local ranks, the same model as plain modules, interleaved rounds, medians of ratios."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.decoder import Decoder
from helixpipe.model.linear import Linear
from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping
from helixpipe.predict.cost import action_seconds, message_bytes
from helixpipe.predict.profile import Profile
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.timeline import Timeline
from helixpipe.schedule.program import Program

# glibc gives large freed blocks back to the system, and whoever runs next pays for faulting them in again: kept instead
ALLOCATOR = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**40))


def launch(ranks: int, function: Callable[..., Any], *args: Any) -> None:
    """function(rank, *args) on local ranks, one thread and one core each, who keep the memory they free."""
    os.environ.update(ALLOCATOR)  # read by each rank's C library as it starts
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_start, (ranks, store.port, function, args), nprocs=ranks)


def _start(rank: int, ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=600))
    function(rank, *args)
    dist.destroy_process_group()


class PlainParts(nn.Module):
    """A run of whole layers as one plain module; embed at the front and head at the end when it has them.

    The last gives logits, so that any loss function can follow.
    """

    def __init__(self, shape: ModelShape, layers: range, seed: int = 0) -> None:
        super().__init__()
        decoder = Decoder(shape, seed)
        mine = [p for p in chain(shape.layers) if p.kind not in ("embed", "head") and p.layer in layers]
        mine += [Part("embed", 0)] * (layers.start == 0) + [Part("head", shape.layers)] * (layers.stop == shape.layers)
        self.shape, self.layers = shape, layers
        self.parts = nn.ModuleDict({str(part).replace(".", "_"): decoder.part(part) for part in mine})
        for module in self.modules():
            if isinstance(module, Linear):
                module.__class__ = nn.Linear  # the peer runs torch's own

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts
        if "embed" in parts:
            x = parts["embed"](x, 0)
        for i in self.layers:
            x = self.layer(x, i)
        head = f"head_{self.shape.layers}"
        return parts[head].output(parts[head].norm(x)) if head in parts else x

    def layer(self, x: Tensor, i: int) -> Tensor:
        parts = self.parts
        q, k, v = parts[f"qkv_{i}"](parts[f"norm_{i}"](x), 0)
        y = parts[f"proj_{i}"](parts[f"attn_{i}"](q, k, v), x)
        return parts[f"mlp_{i}"](y)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def split_step(whole: PlainParts, tokens: Tensor, targets: Tensor, fresh: bool = True) -> float:
    """The perfect split: this rank's share of the micro-batches through the whole model, and no messages.

    Not `fresh`: gradients are added to those there are.
    """
    m, ranks, rank = len(tokens), dist.get_world_size(), dist.get_rank()
    mine = slice(rank * m // ranks, (rank + 1) * m // ranks)
    if fresh:
        whole.zero_grad()
    total = 0.0
    for x, y in zip(tokens[mine].split(1), targets[mine].split(1), strict=True):
        loss = mean_loss(whole(x), y) / m
        loss.backward()
        total += float(loss.detach())
    return total


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender in each round, between barriers; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-warmup, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = timed(contenders[name])
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def interleaved_beside(
    reference: Callable[[], Any], contenders: dict[str, Callable[[], Any]], groups: Iterable[Sequence[str]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each time a contender's name comes, with a reference timed before and after each group: machines drift.

    Returns the contenders' seconds, and for each of them the reference's, the mean of the two around its group.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    beside: dict[str, list[float]] = {name: [] for name in contenders}
    before = timed(reference)
    for group in groups:
        took = [timed(contenders[name]) for name in group]
        after = timed(reference)
        for name, each in zip(group, took, strict=True):
            seconds[name].append(each)
            beside[name].append((before + after) / 2)
        if dist.get_rank() == 0:  # runs take hours
            said = "".join(f"{name} {each:.2f} s, " for name, each in zip(group, took, strict=True))
            print(f"reference {before:.2f} s, {said}reference {after:.2f} s", file=sys.stderr, flush=True)
        before = after
    return seconds, beside


def timed(step: Callable[[], Any]) -> float:
    """Seconds of a step of all ranks, between barriers."""
    dist.barrier()
    begun = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - begun


def ratio(seconds: dict[str, list[float]], of: str, over: str) -> tuple[float, float, float]:
    """Median, least and most of the paired ratios."""
    return paired(seconds[of], seconds[over])


def paired(seconds: list[float], over: list[float]) -> tuple[float, float, float]:
    """Median, least and most of the ratios, round by round."""
    ratios = [a / b for a, b in zip(seconds, over, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def predicted_step(program: Program, profile: Profile, keeping: Keeping) -> Timeline:
    """A program under measured costs, messages and all, with live bytes."""
    link = profile.link
    assert link is not None
    sizes = [message_bytes(message, keeping) for message in program.messages]
    return simulate_program(
        program,
        action_seconds(program.schedule, program.shape, program.batches, profile, keeping),
        lambda message: link.seconds(sizes[message.number]),
        lambda message: sizes[message.number],
        keeping,
        host_seconds=lambda message: sizes[message.number] * link.host_s_per_byte,
    )


def machine() -> str:
    """One line on where this ran."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    )
