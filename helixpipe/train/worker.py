"""Worker: one rank of a job, from its place among the ranks to the end of the loop."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from helixpipe.errors import CheckpointError, ConfigError, HelixpipeError, RankError
from helixpipe.runtime.oom import out_of_memory
from helixpipe.runtime.place import Place
from helixpipe.runtime.watch import starting
from helixpipe.train.held_out import evaluate
from helixpipe.train.job import Job, Prepare
from helixpipe.train.loop import train

# where rank 0 leaves the job for ranks that torchrun started; "" when it has none
_JOB = "helixpipe/job"


def work(job: Job, place: Place, store: Store | None) -> None:
    """Carry out a job as one rank. `store` is where ranks meet, None when there is one. Raises HelixpipeError."""
    torch.set_num_threads(job.config.runtime.threads)
    device = place.device(job.config.runtime.device, "runtime.device")
    group = None
    if store is not None:
        group = _meet(job, place, store, device)
    try:
        if job.task == "train":
            train(job, device, group)
        else:
            evaluate(job, device, group)
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


def join(arguments: Sequence[str], warn: Callable[[str], None], prepare: Prepare) -> int:
    """Be a rank that torchrun started; the exit code. Rank 0 prepares the job for all."""
    place = Place.from_environment()
    try:
        store, _, _ = next(iter(rendezvous("env://")))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {place.rank} did not meet the others: {' '.join(str(error).split())}") from None
    if place.rank == 0:
        text = ""
        try:
            job = prepare(arguments, warn, place.ranks)
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
        work(job, place, store)
    except (CheckpointError, ConfigError):
        if place.rank == 0:
            raise
        return 2  # an error of all ranks, which rank 0 says
    return 0


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


def _main() -> NoReturn:
    """`python -m helixpipe.train.worker`: a rank that the launcher started."""
    line, report = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_launcher, daemon=True, name="helixpipe-launcher").start()
    code = 1
    try:
        _work_as_told(Job.from_json(line))
        code = 0
    except HelixpipeError as error:
        os.write(report, json.dumps([type(error).__name__, str(error)]).encode())
        code = 2
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the waits for peers that tearing down a broken group would do


def _work_as_told(job: Job) -> None:
    place = Place.from_environment()
    port, timeout = int(os.environ["MASTER_PORT"]), timedelta(seconds=job.config.runtime.timeout_s)
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], port, place.ranks, False, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise RankError(f"rank {place.rank} did not meet the others: {' '.join(str(error).split())}") from None
    work(job, place, store)


def _end_with_launcher() -> None:
    """The launcher's end of stdin closes when it ends, however it does."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _main()
