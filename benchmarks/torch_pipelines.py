"""torch's own schedules on the model that ours run: its stages, its step, and the receive buffers it keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as theirs
from peers import PlainParts, mean_loss
from torch import Tensor
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from helixpipe.parts.shape import ModelShape

# name -> (torch's class, stages a rank, whether they form a V)
TORCH: dict[str, tuple[Any, int, bool]] = {
    "torch 1F1B": (theirs.Schedule1F1B, 1, False),
    "torch Interleaved1F1B": (theirs.ScheduleInterleaved1F1B, 2, False),
    "torch InterleavedZeroBubble": (theirs.ScheduleInterleavedZeroBubble, 2, False),
    "torch ZBVZeroBubble": (ScheduleZBVZeroBubble, 2, True),
}


class TorchPipeline:
    """This rank's stages of plain modules under one of torch's schedules."""

    def __init__(self, shape: ModelShape, microbatches: int, tokens: Tensor, targets: Tensor, name: str) -> None:
        kind, per_rank, is_v = TORCH[name]
        rank, ranks = dist.get_rank(), dist.get_world_size()
        count = ranks * per_rank
        mine = [rank, count - 1 - rank] if is_v else list(range(rank, count, ranks))
        each = shape.layers // count
        self.modules = [PlainParts(shape, range(s * each, (s + 1) * each)) for s in mine]
        cpu = torch.device("cpu")
        self._stages = [theirs.PipelineStage(mod, s, count, cpu) for mod, s in zip(self.modules, mine, strict=True)]
        self._schedule = kind(
            self._stages[0] if per_rank == 1 else self._stages, n_microbatches=microbatches, loss_fn=mean_loss
        )
        self._is_last = count - 1 in mine
        self._inputs = [tokens] if 0 in mine else []
        self._targets = targets

    def zero_gradients(self) -> None:
        for module in self.modules:
            module.zero_grad()

    def step(self) -> float:
        """The mean loss, where the last stage is. Gradients are added to those there are."""
        losses: list[Tensor] = []
        self._schedule.step(*self._inputs, **({"target": self._targets, "losses": losses} if self._is_last else {}))
        return float(torch.stack(losses).mean().detach()) if losses else 0.0

    def let_go(self) -> None:
        """Of what the last step left behind and the next one would drop at its start."""
        for stage in self._stages:
            stage.clear_runtime_states()

    @property
    def buffer_bytes(self) -> int:
        """Of receive buffers: one a micro-batch and edge, kept from step to step."""
        infos = [
            info
            for stage in self._stages
            for by_microbatch in (stage.args_recv_info, stage.grad_recv_info)
            for each in by_microbatch.values()
            for info in each
        ]
        return sum(info.buffer.nbytes for info in infos if getattr(info, "buffer", None) is not None)
