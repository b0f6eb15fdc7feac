"""What a rank's process does in a step beside its actions: one rank of 32, interleaved, v = 4, m = 128, alone in a process.

    start   batch, feeds, program (lowered before), weights      end   loss, word, what was recorded
    posts   messages handed to the backend and taken from it     loop  all else between actions

The other 31 are torch's fake backend, whose messages are there at once and whose numbers mean nothing; tensors are tiny. What
gloo or NCCL take for a message comes to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime import pipeline as pipelines
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.stages import Stages
from helixpipe.runtime.transport import Transport
from helixpipe.schedule.families import build_schedule

RANKS, MICROBATCHES, PER_RANK, ROUNDS = 32, 128, 4, 5
SHAPE = ModelShape(layers=RANKS * PER_RANK, hidden=8, heads=1, ffn=8, vocabulary=5)


def measure(rank: int, timer: Callable[[], float] = time.thread_time) -> dict[str, float]:
    """Milliseconds of one rank's step, by where they go; of each the least of some rounds."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=RANKS)
    schedule = build_schedule(
        "interleaved", ranks=RANKS, layers=SHAPE.layers, microbatches=MICROBATCHES, stages_per_rank=PER_RANK
    )
    pipeline = Pipeline(Decoder(SHAPE), schedule, timeout_s=60)
    tokens = torch.zeros(MICROBATCHES, 2, dtype=torch.int64)
    took: dict[str, float] = {}

    def timed(name: str, function: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            begun = timer()
            try:
                return function(*args, **kwargs)
            finally:
                took[name] = took.get(name, 0.0) + timer() - begun

        return inner

    rounds = []
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(pipelines, "execute", timed("execute", pipelines.execute)))
        patched.enter_context(mock.patch.object(Stages, "run", timed("actions", Stages.run)))
        for name in ("send", "receive", "wait", "finish"):
            patched.enter_context(mock.patch.object(Transport, name, timed("posts", getattr(Transport, name))))
        for _ in range(ROUNDS):
            took.clear()
            pipeline.zero_gradients()
            begun = timer()
            pipeline.step(tokens, tokens)
            rounds.append(took | {"step": timer() - begun})
    pipeline.close()
    program = pipeline.last_program.ranks[rank]
    dist.destroy_process_group()
    parts = [
        {
            "start and end": each["step"] - each["execute"], "posts": each["posts"],
            "loop": each["execute"] - each["actions"] - each["posts"], "in actions": each["actions"],
        }
        for each in rounds[1:]
    ]  # fmt: skip
    least = {name: min(each[name] for each in parts) * 1e3 for name in parts[0]}
    count = sum(type(each).__name__ == "Run" for each in program)
    return {"actions": count, "instructions": len(program)} | least
