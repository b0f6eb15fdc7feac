"""What an action costs the host beside its kernels: tiny tensors on two ranks, 1F1B, and how a step grows with its micro-batches.

    (seconds of m = 72 - those of m = 8) / 128 actions   - the same modules in a plain loop, forward and backward

Messages are in it: posted, waited for and let go, by all threads of the rank. torch's own 1F1B runs the same modules beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peers import PlainParts, mean_loss
from torch_pipelines import TorchPipeline

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=2, hidden=16, heads=2, ffn=32, vocabulary=17)
LENGTH, FEW, MANY, ROUNDS = 16, 8, 72, 9


def overhead(rank: int) -> dict[str, dict[str, float]]:
    """On a rank of two: milliseconds an action, of this process's processors and of the clock; kernels alone, and what is beside them."""
    steps: dict[str, Callable[[], Any]] = {}
    pipelines = []
    for count in (FEW, MANY):
        tokens = torch.zeros(count, LENGTH, dtype=torch.int64)
        for recompute in ("none", "selective"):
            schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=count)
            pipelines.append(Pipeline(Decoder(SHAPE), schedule, recompute=recompute, timeout_s=60))
            steps[f"ours, {recompute} {count}"] = lambda p=pipelines[-1], t=tokens: p.step(t, t)  # type: ignore[misc]
        theirs = TorchPipeline(SHAPE, count, tokens, tokens, "torch 1F1B")
        steps[f"torch 1F1B {count}"] = theirs.step
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

    steps["kernels"] = bare
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(-1, ROUNDS):
        for name, step in steps.items():
            dist.barrier()
            cpu, clock = time.process_time(), time.perf_counter()
            step()
            if turn >= 0:
                took[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    for pipeline in pipelines:
        pipeline.close()
    # the least of the rounds: others only ever add
    least = {name: [min(each[i] for each in some) * 1e3 for i in (0, 1)] for name, some in took.items()}
    kernels = [each / (2 * MANY) for each in least["kernels"]]
    found = {}
    for name in ("ours, none", "ours, selective", "torch 1F1B"):
        each = [(least[f"{name} {MANY}"][i] - least[f"{name} {FEW}"][i]) / (2 * (MANY - FEW)) for i in (0, 1)]
        found[name] = {
            "cpu": each[0], "kernels, cpu": kernels[0], "beside, cpu": each[0] - kernels[0],
            "clock": each[1], "kernels, clock": kernels[1], "beside, clock": each[1] - kernels[1],
        }  # fmt: skip
    return found
