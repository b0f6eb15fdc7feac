"""The incumbent's step with parts that sleep: a schedule of torch.distributed.pipelining over forked ranks.

A stage is a module of tiny tensors. Its seconds stand at nodes of their own in the autograd graph, so that torch's full
backward and its split one (stage_backward_input, stage_backward_weight) sleep what their part of the backward takes:

    x ── Inputs ── + ── y        Inputs    forward sleeps F, backward I
                   |             Weights   backward sleeps W; a backward for the inputs alone does not pass it
    weight ── Weights
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as theirs
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from helixpipe.runtime.emulated import sleep_until

CLASSES: dict[str, Any] = {
    "1F1B": theirs.Schedule1F1B,
    "Interleaved1F1B": theirs.ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": theirs.ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
}


class Sleeping(nn.Module):
    """One stage. `seconds` are those of F, I and W; `scale` 0 is a step that takes no time."""

    def __init__(self, seconds: tuple[float, float, float], is_first: bool) -> None:
        super().__init__()
        self.seconds, self.scale = seconds, 1.0
        self.slept: list[tuple[int, float, float]] = []
        """(0 for F, 1 for I, 2 for W), start and end."""
        self.weight = nn.Parameter(torch.zeros(1))
        # a first stage computes gradients down to its embedding, though its input needs none
        self.table = nn.Parameter(torch.zeros(1)) if is_first else None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is not None:
            x = x + self.table
        y: Tensor = Inputs.apply(x, self)
        return y + Weights.apply(self.weight, self)

    def sleep(self, which: int) -> None:
        begun = time.perf_counter()
        sleep_until(begun + self.scale * self.seconds[which])
        self.slept.append((which, begun, time.perf_counter()))


class Inputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Sleeping) -> Tensor:
        ctx.stage = stage
        stage.sleep(0)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.stage.sleep(1)
        return gradient.clone(), None


class Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: Sleeping) -> Tensor:
        ctx.stage = stage
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.stage.sleep(2)
        return gradient.sum().reshape(1), None


@dataclass
class TorchStep:
    """A job of forked ranks: one step of torch's schedule `name`, after one that takes no time.

    `stage_seconds[s]` are those of F, I and W of stage s. Stage c*p + r is on rank r, or they form a V.
    """

    name: str
    ranks: int
    microbatches: int
    stage_seconds: list[tuple[float, float, float]]
    timeout_s: float = 120.0

    @property
    def limit_s(self) -> float:
        return self.microbatches * sum(map(sum, self.stage_seconds)) + 2 * self.timeout_s

    @property
    def per_rank(self) -> int:
        return len(self.stage_seconds) // self.ranks

    def prepare(self) -> None:
        """Nothing is shared."""

    def run(self, rank: int, store: Store) -> dict[str, Any]:
        """`start_s` and `end_s` of the step on this rank, how often it slept F, I and W, and torch's order of every rank."""
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=self.ranks, timeout=timedelta(seconds=self.timeout_s)
        )
        count = len(self.stage_seconds)
        is_v = self.name == "ZBVZeroBubble"
        mine = [rank, count - 1 - rank] if is_v else list(range(rank, count, self.ranks))
        modules = [Sleeping(self.stage_seconds[s], s == 0) for s in mine]
        stages = [
            theirs.PipelineStage(module, s, count, torch.device("cpu"))
            for module, s in zip(modules, mine, strict=True)
        ]  # fmt: skip
        schedule = CLASSES[self.name](
            stages[0] if self.per_rank == 1 else stages, n_microbatches=self.microbatches, loss_fn=_loss
        )
        given = [torch.zeros(self.microbatches, 1)] if 0 in mine else []
        for scale in (0.0, 1.0):  # the first finds shapes and makes connections
            for module in modules:
                module.scale = scale
                module.slept.clear()
            losses: list[Tensor] = []
            named = {"target": torch.zeros(self.microbatches, 1), "losses": losses} if count - 1 in mine else {}
            dist.barrier()
            start_s = time.perf_counter()
            schedule.step(*given, **named)
            end_s = time.perf_counter()
        dist.barrier()
        sleeps = [sum(which == kind for module in modules for which, _, _ in module.slept) for kind in range(3)]
        order = getattr(schedule, "pipeline_order", None) if rank == 0 and self.per_rank > 1 else None
        told = [[str(a) for a in order[r] if a is not None] for r in range(self.ranks)] if order else None
        return {"start_s": start_s, "end_s": end_s, "sleeps": sleeps, "order": told}


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).sum()
