"""Held-out: losses on text that is never trained on, while a run trains and of a checkpoint by itself.

Windows are the data's, the sequence length's and `train.evaluate_sequences`' alone, and losses are sums until the end, so that
any two schedules, meshes and batches give the same number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helixpipe.errors import ConfigError
from helixpipe.runtime.losses import Losses
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.data import Batch, Corpus, open_corpus
from helixpipe.train.job import Job
from helixpipe.train.log import described, shortened
from helixpipe.train.losses_text import Evaluation
from helixpipe.train.objective import NEXT_TOKEN, Objective
from helixpipe.train.start import check_same_data, make_pipeline


def evaluate(job: Job, device: str, group: dist.ProcessGroup | None) -> None:
    """Tell the held-out losses of the job's checkpoint, or of its folder, on rank 0: a table or a JSON object on standard output.

    `group` carries objects between the ranks' CPUs, None with one rank. Nothing is written anywhere.
    """
    config, checkpoint = job.config, job.checkpoint
    corpus, pipeline = open_corpus(config), make_pipeline(config, device, checkpoint)
    check_same_data(corpus.fingerprint(), pipeline, group)
    if checkpoint is not None:
        Checkpoints(checkpoint.parent, 1, group).load(checkpoint, _weights(pipeline))
    weights = shortened(checkpoint or Path(config.model.path or ""))
    if config.model.adapter and not checkpoint:
        weights += f" with {shortened(Path(config.model.adapter))}"
    asked, speaks = config.train.evaluate_sequences, pipeline.mesh.rank == 0
    count = corpus.windows(asked)
    if speaks:
        print(described(config, device), file=sys.stderr)
        print(f"weights of {weights}" + (f", step {job.step}" if checkpoint else ""), file=sys.stderr, flush=True)
    with Progress(
        TextColumn("held-out sequences"), MofNCompleteColumn(), BarColumn(16), TimeRemainingColumn(compact=True),
        console=Console(stderr=True), disable=not speaks or not sys.stderr.isatty(), transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=count)
        objective = Objective.of(config)
        losses = held_out_losses(pipeline, corpus, asked, objective, lambda done: progress.update(bar, completed=done))
    pipeline.close()
    check_finite(losses, weights, "its weights, or what they make, are beyond runtime.dtype; choose another checkpoint")
    if speaks:
        found = Evaluation(losses, weights, job.step, count, config.train.sequence_length)
        print(found.to_json() if job.as_json else found.table(), flush=True)


def held_out_losses(
    pipeline: Pipeline,
    corpus: Corpus,
    sequences: int,
    objective: Objective = NEXT_TOKEN,
    tell: Callable[[int], None] = lambda done: None,
) -> Losses:
    """Of so many held-out sequences, or as many as there are. `tell` hears how many are done."""
    found = []
    for done, batch in enumerate(objective.held_out(corpus, sequences), start=1):
        found.append(pipeline.losses(**tensors(batch)))
        tell(min(done * corpus.batch_size, corpus.windows(sequences)))
    return Losses.joined(found)


def check_finite(losses: Losses, whose: str, advice: str) -> None:
    """Raise ConfigError for a loss that is no finite number."""
    if not losses.counted:
        raise ConfigError(f"{whose}: no target of the held-out data counts; give data.held_out a larger share")
    if not math.isfinite(losses.mean):
        raise ConfigError(f"{whose}: the held-out loss is {losses.mean}; {advice}")


def tensors(batch: Batch) -> dict[str, Any]:
    """A batch as arguments of a pipeline's methods."""
    arrays = {name: torch.from_numpy(each) for name, each in batch._asdict().items() if isinstance(each, np.ndarray)}
    return arrays | ({"documents": batch.documents} if batch.documents else {})


def _weights(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """This rank's parameters and buffers by their names in checkpoints: filling them fills the model."""
    named = {name: pipeline.as_whole(name, parameter.data) for name, parameter in pipeline.parameters.items()}
    return {f"model.{name}": tensor for name, tensor in (pipeline.buffers() | named).items()}
