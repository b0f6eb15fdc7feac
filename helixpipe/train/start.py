"""Start: what a rank of any job begins with, the pipeline of a config, and data that is the same on all machines."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

from helixpipe.config import Config
from helixpipe.errors import DataError
from helixpipe.runtime.mesh import make_device_mesh
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.partition import Cut, Documents
from helixpipe.schedule.schedule import Schedule
from helixpipe.train.initial import initial_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_CUTS = 64  # remembered: those of a step's micro-batches


def make_pipeline(config: Config, device: str, checkpoint: Path | None) -> Pipeline:
    """The config's model under its schedule and mesh. Collective. Its weights are the initial ones; those of a folder are not
    read where a `checkpoint` is to fill them.
    """
    runtime, schedule = config.runtime, config.build_schedule()
    with initial_model(config, schedule, checkpoint) as model:
        return Pipeline(
            model,
            schedule,
            make_device_mesh(config.mesh_shape(), device, runtime.timeout_s),
            device=device,
            dtype=_DTYPES[runtime.dtype],
            recompute=runtime.recompute,
            timeout_s=runtime.timeout_s,
            segment_lengths=_cut(config, schedule),
            context_method=config.mesh.context_method,
            layout=config.mesh.layout,
            communicators=runtime.communicators,
            compiled=runtime.compile,
            attention=runtime.attention,
            arrange=config.order_of_steps(schedule),
        )


def _cut(config: Config, schedule: Schedule) -> Cut | None:
    """As the config cuts sequences, each micro-batch's by its documents; None when they stay whole."""
    if schedule.segments == 1:
        return None
    setting = config.setting()

    @lru_cache(maxsize=_CUTS)
    def cut(length: int, documents: Documents) -> tuple[int, ...]:
        return setting.segment_lengths(schedule.segments, documents)

    return cut


def check_same_data(mine: tuple[int, ...], pipeline: Pipeline, group: dist.ProcessGroup | None) -> None:
    """Machines have files of their own: raise DataError, on all ranks, where they are not the same."""
    if group is not None:
        everyone = [mine] * dist.get_world_size(group)
        with pipeline.together("the comparison of data"):
            dist.all_gather_object(everyone, mine, group)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise DataError(
                    f"data.path: rank {rank} reads other tokens than rank 0; give all machines the same data"
                )
