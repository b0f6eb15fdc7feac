"""The training program of one rank, top to bottom."""

from __future__ import annotations

import math
import signal
import time
from typing import NamedTuple

import torch.distributed as dist

from helixpipe.runtime.pipeline import Pipeline
from helixpipe.train.ahead import Ahead
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.data import Batch, Corpus, open_corpus
from helixpipe.train.device import peak_memory
from helixpipe.train.held_out import check_finite, held_out_losses, tensors
from helixpipe.train.job import Job
from helixpipe.train.log import Log
from helixpipe.train.manifest import read_manifest
from helixpipe.train.model_flops import ModelFlops
from helixpipe.train.objective import Objective
from helixpipe.train.optimizer import Optimizer
from helixpipe.train.record import Ranks, StepRecord, Stopwatch
from helixpipe.train.saver import Saver
from helixpipe.train.skipping import Skipping
from helixpipe.train.start import check_same_data, make_pipeline
from helixpipe.train.stop import Stop
from helixpipe.train.straggler import Straggler
from helixpipe.train.trace import Trace
from helixpipe.train.usage import Usage

# a checkpoint is due: less than any signal's number, after which there is one anyway
_DUE = 0.5


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
    checkpoints = Checkpoints(job.checkpoints, run.keep, group, data, run.keep_every, run.keep_hours)
    used, skipping = Usage(), Skipping(settings, 0)
    if job.checkpoint is not None:
        before = read_manifest(job.checkpoint)
        used, skipping = Usage.from_table(before.read), Skipping(settings, before.skipped)
        checkpoints.load(job.checkpoint, optimizer.state(job.step - skipping.skipped))
    pipeline.steps = job.step

    # what it costs
    model_flops, straggler, watch = ModelFlops(config.shape()), Straggler(), Stopwatch()
    tracing = Trace(run.profile_step, job.folder, pipeline.mesh.rank, device)

    def read(step: int) -> Read:
        rows = corpus.reading.step(step)
        batch = objective.training(corpus.read(rows), step)
        length = batch.tokens.shape[1]
        pipeline.prepare(len(rows), length, batch.documents or None)
        return Read(batch, corpus.reading.used(rows), model_flops.of(rows, length))

    def say() -> list[float]:
        return [stop.asked or _DUE * saver.due(), straggler.ratio(pipeline.spans()), *peak_memory(device)]

    with (
        Log(job, pipeline.mesh.rank, device) as log,
        Ahead(read) as ahead,
        Saver(checkpoints, config, device, log, pipeline.wait_for) as saver,
    ):
        log.reading(corpus.described())
        if pipeline.attention:
            log.reading(f"attention by {pipeline.attention}")
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
            loss = pipeline.step(**tensors(batch), clip_norm=settings.clip_norm or math.inf, say=say)
            told = pipeline.told
            assert told is not None
            gradient_norm = told.gradient_norm
            if not math.isfinite(loss + gradient_norm):
                cause = pipeline.first_nonfinite(**tensors(batch))
                log.skipped(step, skipping.skip(step, loss, gradient_norm, cause), cause)
            else:
                skipping.passed()
                rate = optimizer.step(step - 1)

                # what it cost
                seconds = time.perf_counter() - begun
                ranks = Ranks.of([rank[1:] for rank in told.said], pipeline.mesh.name)
                log.step(StepRecord(step, loss, gradient_norm, rate, seconds, told.totals, flops, watch.taken(), ranks))
                if step == run.timeline_step and (timeline := pipeline.timeline_on_first()):
                    log.draw(timeline, pipeline.last_program, step, batch.documents)
            log.remark(tracing.end())

            # how well it does on text it never trains on, and a place to go on from
            last = step == settings.steps
            of_any = max(rank[0] for rank in told.said)  # so that all do the same after the same step
            asked, due = (0, False) if last else (int(of_any), of_any == _DUE)
            saver.look()
            if last or (settings.evaluate_every and step % settings.evaluate_every == 0):
                with watch.on("evaluation_s"):
                    evaluate(pipeline, corpus, objective, settings.evaluate_sequences, log, step)
            every = run.checkpoint_every and step % run.checkpoint_every == 0
            if run.saves and (last or asked or due or every):
                state = optimizer.state()
                with watch.on("checkpoint_s"):
                    saver.save(state, step, used.table(corpus.epochs(step)), skipping.skipped)
            if asked:
                saver.end(f"stopped by {signal.Signals(asked).name}, and ")
                log.stopped(step, signal.Signals(asked).name)
                break
        saver.end()
        log.reading(used.told(corpus.epochs(step)))
    pipeline.close()
    return not log.was_stopped


class Read(NamedTuple):
    """What a step reads."""

    batch: Batch
    used: Usage
    flops: float


def evaluate(pipeline: Pipeline, corpus: Corpus, objective: Objective, sequences: int, log: Log, step: int) -> None:
    """The loss over the same held-out windows every time, logged; nothing when no data is held out. Raises ConfigError for one
    that is not finite.
    """
    if len(corpus.held_out):
        losses = held_out_losses(pipeline, corpus, sequences, objective)
        check_finite(losses, f"step {step}", "lower train.learning_rate, or go on from an earlier checkpoint")
        log.evaluation(step, losses.mean, [each.mean if each.counted else None for each in losses.by_position])
