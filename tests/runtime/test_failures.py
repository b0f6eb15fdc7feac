"""A distributed run never hangs: it ends, and names who waited for what, from whom, and what that rank did."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch

from helixpipe.errors import RankError
from helixpipe.model.decoder import Decoder
from helixpipe.model.layers import MLP
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.shape import ModelShape

SHAPE = ModelShape(layers=2, hidden=16, heads=2, ffn=32, vocabulary=17)


def _rank(rank: int, port: int, fate: str, results: Any) -> None:
    """Rank 1 meets its fate in the MLP of layer 1, which the schedule puts on it."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    pipeline = Pipeline(Decoder(SHAPE), build_schedule("1f1b", ranks=2, layers=2, microbatches=4), timeout_s=4)
    tokens, targets = batch(SHAPE, 4, 8)
    pipeline.step(tokens, targets)
    if rank == 1:
        whole = MLP.whole

        def doomed(self: MLP, y: torch.Tensor) -> torch.Tensor:
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
            return whole(self, y)

        MLP.whole = doomed  # type: ignore[method-assign]
    begun = time.monotonic()
    try:
        pipeline.step(tokens, targets)
        results.put(("no error", 0.0))
    except RankError as error:
        results.put((str(error), time.monotonic() - begun))


@pytest.mark.parametrize("fate", ["killed", "silent"])
def test_a_rank_that_dies_or_is_silent_is_named(fate: str) -> None:
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, store.port, fate, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        message, took_s = results.get(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    assert took_s < 15
    if fate == "killed":
        assert re.fullmatch(
            r"rank 0, at .*, lost rank 1 while waiting for .* from rank \d to rank \d; "
            r"rank 1 was last heard of \d+ s ago, at .*",
            message,
        ), message
    else:
        assert re.fullmatch(
            r"rank 0, at action 0B0, waited 4 s for x\.1 of 1B0 from rank 1 to rank 0; "
            r"rank 1 was last heard of [0-2] s ago, at action 1F0",
            message,
        ), message
