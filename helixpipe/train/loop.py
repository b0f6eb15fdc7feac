"""The training program of one rank, top to bottom."""

from __future__ import annotations

import math
import signal
import time
from typing import NamedTuple

import torch.distributed as dist

from helixpipe.errors import ConfigError
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.train.ahead import Ahead
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.data import Batch, Corpus, open_corpus
from helixpipe.train.device import peak_memory
from helixpipe.train.held_out import held_out_losses, tensors
from helixpipe.train.job import Job
from helixpipe.train.log import Log
from helixpipe.train.manifest import read_manifest
from helixpipe.train.model_flops import ModelFlops
from helixpipe.train.objective import Objective
from helixpipe.train.optimizer import Optimizer
from helixpipe.train.record import Ranks, StepRecord, Stopwatch
from helixpipe.train.start import check_same_data, make_pipeline
from helixpipe.train.stop import Stop
from helixpipe.train.straggler import Straggler
from helixpipe.train.trace import Trace
from helixpipe.train.usage import Usage


def train(job: Job, device: str, group: dist.ProcessGroup | None, stop: Stop) -> bool:
    """Train until the config's last step, or until a step after which `stop` was asked on any rank; whether it came to the
    last. `group` carries objects between the ranks' CPUs, None with one rank.

    The same job gives the same losses, on CPUs bit for bit, however often it is interrupted: weights and optimizer
    come from the checkpoint, batches and learning rate from the step alone. On CUDA attention's backward adds in no
    fixed order.
    """
    config = job.config
    settings, run = config.train, config.run

    # what is trained, for what, and how it is spread
    corpus, pipeline = open_corpus(config), make_pipeline(config, device, job.checkpoint)
    objective = Objective.of(config)
    shards = pipeline.shards() if config.mesh.optimizer == "sharded" else None
    optimizer = Optimizer(pipeline.parameters, settings, pipeline.as_whole, shards, pipeline.buffers)

    data = corpus.fingerprint()
    check_same_data(data, pipeline, group)

    # where it goes on
    checkpoints = Checkpoints(job.checkpoints, run.keep, group, data)
    if job.checkpoint is not None:
        checkpoints.load(job.checkpoint, optimizer.state(job.step))
    used = Usage.from_table(read_manifest(job.checkpoint).read) if job.checkpoint else Usage()

    # what it costs
    model_flops, straggler, watch = ModelFlops(config.shape()), Straggler(), Stopwatch()
    tracing = Trace(run.profile_step, job.folder, pipeline.mesh.rank, device)

    def read(step: int) -> Read:
        rows = corpus.reading.step(step)
        batch = objective.training(corpus.read(rows), step)
        length = batch.tokens.shape[1]
        pipeline.prepare(len(rows), length, batch.documents or None)
        return Read(batch, corpus.reading.used(rows), model_flops.of(rows, length))

    with Log(job, pipeline.mesh.rank, device) as log, Ahead(read) as ahead:
        log.reading(corpus.described())
        if job.step == 0:
            with watch.on("evaluation_s"):
                evaluate(pipeline, corpus, objective, settings.evaluate_sequences, log, step=0)
        step = job.step
        for step in range(job.step + 1, settings.steps + 1):
            begun = time.perf_counter()

            # forward and backward of every micro-batch, gradients of all ranks, one update
            with watch.on("data_s"):
                batch, reads, flops = ahead.of(step)
            used += reads
            if step < settings.steps:
                ahead.begin(step + 1)
            tracing.begin(step)
            pipeline.zero_gradients()
            loss = pipeline.step(**tensors(batch))
            gradient_norm = pipeline.clip_gradients(settings.clip_norm or math.inf)
            if not math.isfinite(loss + gradient_norm):
                raise ConfigError(
                    f"step {step}: loss {loss}, gradient norm {gradient_norm}; lower train.learning_rate or train.clip_norm"
                )
            rate = optimizer.step(step - 1)
            log.remark(tracing.end())

            # what it cost; and what any rank was asked, so that all stop after the same step
            timeline = pipeline.timeline()
            seconds = time.perf_counter() - begun
            of_ranks = pipeline.numbers([stop.asked, straggler.ratio(pipeline.spans()), *peak_memory(device)])
            ranks = Ranks.of([numbers[1:] for numbers in of_ranks], pipeline.mesh.name)
            log.step(StepRecord(step, loss, gradient_norm, rate, seconds, timeline, flops, watch.taken(), ranks))
            if step == run.timeline_step:
                log.draw(timeline, pipeline.last_program, step, batch.documents)

            # how well it does on text it never trains on, and a place to go on from
            last = step == settings.steps
            asked = 0 if last else int(max(numbers[0] for numbers in of_ranks))
            if last or (settings.evaluate_every and step % settings.evaluate_every == 0):
                with watch.on("evaluation_s"):
                    evaluate(pipeline, corpus, objective, settings.evaluate_sequences, log, step)
            if run.checkpoint_every and (last or asked or step % run.checkpoint_every == 0):
                with watch.on("checkpoint_s"):
                    log.flush()
                    checkpoints.save(optimizer.state(step), step, config, used.table(corpus.epochs(step)))
            if asked:
                log.stopped(step, signal.Signals(asked).name)
                break
        log.reading(used.told(corpus.epochs(step)))
    pipeline.close()
    return not log.was_stopped


class Read(NamedTuple):
    """What a step reads."""

    batch: Batch
    used: Usage
    flops: float


def evaluate(pipeline: Pipeline, corpus: Corpus, objective: Objective, sequences: int, log: Log, step: int) -> None:
    """The loss over the same held-out windows every time, logged; nothing when no data is held out."""
    if len(corpus.held_out):
        losses = held_out_losses(pipeline, corpus, sequences, objective)
        log.evaluation(step, losses.mean, [bucket.mean for bucket in losses.by_position])
