"""Worker: one rank of a job, from its place among the ranks to the end of the loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import rendezvous  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import Store

from helixpipe.errors import CheckpointError, ConfigError, HelixpipeError, RankError
from helixpipe.runtime.oom import out_of_memory
from helixpipe.runtime.place import Place
from helixpipe.runtime.watch import starting
from helixpipe.train.held_out import evaluate
from helixpipe.train.job import Job, Prepare
from helixpipe.train.lock import claimed
from helixpipe.train.loop import train
from helixpipe.train.meeting import meet
from helixpipe.train.stop import STOPPED, Stop

# where rank 0 leaves the job for ranks that torchrun started; "" when it has none
_JOB = "helixpipe/job"
CONNECT = timedelta(seconds=30)
"""For a store of torchrun's own, which is there before its ranks are: where it does not answer, the launcher is gone. torch tries up to twice as long."""


def work(job: Job, place: Place, store: Store | None, stop: Stop) -> int:
    """Carry out a job as one rank; the exit code. `store` is where ranks meet, None when there is one. Raises HelixpipeError."""
    torch.set_num_threads(job.config.runtime.threads)
    device = place.device(job.config.runtime.device, "runtime.device")
    group = None
    if store is not None:
        group = _meet(job, place, store, device)
    try:
        code = 0
        if job.task == "evaluate":
            evaluate(job, device, group)
        elif not train(job, device, group, stop):
            code = STOPPED
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said, _, _ = str(error).partition("\n")
        raise HelixpipeError(
            f"rank {place.rank} ran out of memory on {device}: lower train.sequence_length or train.microbatch_size, "
            f"or set runtime.recompute, mlp_chunk and head_chunk ({said or type(error).__name__})"
        ) from None
    if group is not None:
        dist.destroy_process_group()
    return code


def join(arguments: Sequence[str], warn: Callable[[str], None], prepare: Prepare) -> int:
    """Be a rank that torchrun started; the exit code. Rank 0 prepares the job for all."""
    place, stop = Place.from_environment(), Stop()
    try:
        with stop.listening(), ExitStack() as held:
            return _join(place, stop, held, lambda: prepare(arguments, warn, place.ranks))
    except HelixpipeError as error:
        _leave_word(error)
        raise


def _join(place: Place, stop: Stop, held: ExitStack, prepare: Callable[[], Job]) -> int:
    try:
        of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store, _, _ = next(iter(rendezvous("env://", timeout=CONNECT if of_launcher else default_pg_timeout)))
        store.set_timeout(default_pg_timeout)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {place.rank} did not meet the others: {' '.join(str(error).split())}") from None
    with starting(place.rank):
        store = meet(store, place.rank, place.ranks, store.timeout)
    if place.rank == 0:
        text = ""
        try:
            job = held.enter_context(claimed(prepare()))
            text = job.to_json()
        finally:
            store.set(_JOB, text)
    else:
        with starting(place.rank):
            text = store.get(_JOB).decode()
        if not text:
            return 2  # rank 0 says why
        job = Job.from_json(text)
    place.device(job.config.runtime.device, "runtime.device")  # a fault of this machine alone: whoever has it says it
    try:
        return work(job, place, store, stop)
    except (CheckpointError, ConfigError):
        if place.rank == 0:
            raise
        return 2  # an error of all ranks, which rank 0 says


def _leave_word(error: HelixpipeError) -> None:
    """For torchrun, which ends its own report with what a rank left in a file."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": said}), encoding="utf-8")


def _meet(job: Job, place: Place, store: Store, device: str) -> dist.ProcessGroup:
    """Join the group of all ranks; the group in which objects travel between CPUs."""
    timeout = timedelta(seconds=job.config.runtime.timeout_s)
    with starting(place.rank):
        dist.init_process_group(
            place.backend(device), store=store, rank=place.rank, world_size=place.ranks, timeout=timeout
        )
        # a checkpoint of a big model takes longer than a message may
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout * 10)
    return group
