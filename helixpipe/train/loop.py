"""The training program of one rank, top to bottom."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.errors import ConfigError, DataError
from helixpipe.runtime.mesh import make_device_mesh
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.data import Batch, Corpus, open_corpus
from helixpipe.train.initial import initial_model
from helixpipe.train.job import Job
from helixpipe.train.log import Log, StepRecord
from helixpipe.train.optimizer import Optimizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def train(job: Job, device: str, group: dist.ProcessGroup | None) -> None:
    """Train until the config's last step. `group` carries objects between the ranks' CPUs, None with one rank.

    The same job gives the same losses, on CPUs bit for bit, however often it is interrupted: weights and optimizer
    come from the checkpoint, batches and learning rate from the step alone. On CUDA attention's backward adds in no
    fixed order.
    """
    config = job.config
    settings, run = config.train, config.run

    # what is trained, and how it is spread
    schedule, corpus = config.build_schedule(), open_corpus(config)
    with initial_model(config, schedule, job.checkpoint) as model:
        pipeline = Pipeline(
            model,
            schedule,
            make_device_mesh(config.mesh_shape(), device, config.runtime.timeout_s),
            device=device,
            dtype=_DTYPES[config.runtime.dtype],
            recompute=config.runtime.recompute,
            timeout_s=config.runtime.timeout_s,
            segment_lengths=config.segment_lengths(schedule),
            context_method=config.mesh.context_method,
            layout=config.mesh.layout,
        )
    shards = pipeline.shards() if config.mesh.optimizer == "sharded" else None
    optimizer = Optimizer(pipeline.parameters, settings, pipeline.as_whole, shards, pipeline.buffers)

    data = corpus.fingerprint()
    _check_same_data(data, pipeline, group)

    # where it goes on
    checkpoints = Checkpoints(job.checkpoints, run.keep, group, data)
    if job.checkpoint is not None:
        checkpoints.load(job.checkpoint, optimizer.state(job.step))

    with Log(job, pipeline.mesh.rank, device) as log:
        if job.step == 0:
            evaluate(pipeline, corpus, settings.evaluate_batches, log, step=0)
        for step in range(job.step + 1, settings.steps + 1):
            begun = time.perf_counter()

            # forward and backward of every micro-batch, gradients of all ranks, one update
            pipeline.zero_gradients()
            loss = pipeline.step(*_tensors(corpus.batch(step)))
            gradient_norm = pipeline.clip_gradients(settings.clip_norm or math.inf)
            if not math.isfinite(loss + gradient_norm):
                raise ConfigError(
                    f"step {step}: loss {loss}, gradient norm {gradient_norm}; lower train.learning_rate or train.clip_norm"
                )
            rate = optimizer.step(step - 1)

            # what it cost
            timeline = pipeline.timeline()
            log.step(StepRecord(step, loss, gradient_norm, rate, time.perf_counter() - begun, timeline))
            if step == run.timeline_step:
                log.draw(timeline, pipeline.last_program, step)

            # how well it does on text it never trains on, and a place to go on from
            last = step == settings.steps
            if last or (settings.evaluate_every and step % settings.evaluate_every == 0):
                evaluate(pipeline, corpus, settings.evaluate_batches, log, step)
            if run.checkpoint_every and (last or step % run.checkpoint_every == 0):
                log.flush()
                checkpoints.save(optimizer.state(step), step, config)
    pipeline.close()


def evaluate(pipeline: Pipeline, corpus: Corpus, batches: int, log: Log, step: int) -> None:
    """The mean loss over the same held-out windows every time, logged; nothing when no data is held out."""
    if len(corpus.held_out):
        losses = [pipeline.evaluate(*_tensors(batch)) for batch in corpus.evaluation(batches)]
        log.evaluation(step, math.fsum(losses) / len(losses))


def _check_same_data(mine: tuple[int, ...], pipeline: Pipeline, group: dist.ProcessGroup | None) -> None:
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


def _tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
