"""What an action costs the host beside its kernels: tiny tensors on two ranks, 1F1B, and how a step grows with its micro-batches.

    (processor seconds of m = 72 - those of m = 8) / 128 actions   - the same modules in a plain loop, forward and backward

Messages are in it: posted, waited for and let go, by all threads of the rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peers import PlainParts, mean_loss

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=2, hidden=16, heads=2, ffn=32, vocabulary=17)
LENGTH, FEW, MANY, ROUNDS = 16, 8, 72, 9


def least(function: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """Seconds of this process's processors and of the clock, the least of some rounds: others only ever add to them."""
    found = []
    for _ in range(rounds):
        dist.barrier()
        cpu, clock = time.process_time(), time.perf_counter()
        function()
        found.append((time.process_time() - cpu, time.perf_counter() - clock))
    return min(cpu for cpu, _ in found), min(clock for _, clock in found)


def overhead(rank: int, recompute: str) -> dict[str, float]:
    """On a rank of two: milliseconds an action, with its kernels, of these alone, and the difference."""
    steps = {}
    for count in (FEW, MANY):
        schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=count)
        pipeline = Pipeline(Decoder(SHAPE), schedule, recompute=recompute, timeout_s=60)
        tokens = torch.zeros(count, LENGTH, dtype=torch.int64)
        pipeline.step(tokens, tokens)
        steps[count] = least(lambda pipeline=pipeline, tokens=tokens: pipeline.step(tokens, tokens))
        pipeline.close()
    plain = PlainParts(SHAPE, range(rank, rank + 1))

    def bare() -> None:
        for _ in range(MANY):
            x = (
                torch.zeros(1, LENGTH, dtype=torch.int64)
                if rank == 0
                else torch.zeros(1, LENGTH, 16, requires_grad=True)
            )
            out = plain(x)
            if rank == 0:
                out.backward(torch.zeros_like(out))
            else:
                mean_loss(out, torch.zeros(1, LENGTH, dtype=torch.int64)).backward()

    bare()
    actions = 2 * (MANY - FEW)
    cpu, clock = ((steps[MANY][i] - steps[FEW][i]) / actions * 1e3 for i in (0, 1))
    kernels, kernels_clock = (each / (2 * MANY) * 1e3 for each in least(bare))
    return {
        "action, cpu": cpu, "kernels, cpu": kernels, "overhead, cpu": cpu - kernels,
        "action, clock": clock, "kernels, clock": kernels_clock, "step of 8, cpu": steps[FEW][0] * 1e3,
    }  # fmt: skip
