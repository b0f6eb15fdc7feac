"""A distributed run never hangs: it ends, and names who waited for what, from whom, and what that rank did."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from ranks import CONTEXT, Ranks
from test_mesh import device_mesh, sized
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from helixpipe.errors import RankError
from helixpipe.mesh import MeshShape
from helixpipe.model.decoder import Decoder
from helixpipe.model.mlp import MLP
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.mesh import Mesh, make_device_mesh
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.train.start import check_same_data

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


def _told_by_rank_0(work: Callable[..., None], *args: str) -> tuple[str, float]:
    """The message of the error, and after how long."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=work, args=(rank, store.port, *args, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        message, took_s = results.get(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    return message, took_s


@pytest.mark.parametrize("fate", ["killed", "silent"])
def test_a_rank_that_dies_or_is_silent_is_named(fate: str) -> None:
    message, took_s = _told_by_rank_0(_rank, fate)
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


def _between(rank: int, port: int, at: str, fate: str, results: Any) -> None:
    """Rank 1 meets its fate where all ranks do something together, before or after a step."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    _set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)

    def together() -> None:
        if rank == 1:
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    begun = time.monotonic()
    try:
        if at == "groups":
            together()
            make_device_mesh(MeshShape(dp=2), "cpu", timeout_s=4)
        else:
            pipeline = Pipeline(Decoder(SHAPE), build_schedule("1f1b", ranks=2, layers=2, microbatches=4), timeout_s=4)
            if at == "data":
                together()
                check_same_data((3, 2, 1), pipeline, dist.group.WORLD)
            else:
                pipeline.step(*batch(SHAPE, 4, 8))
                together()
                pipeline.timeline()
        results.put(("no error", 0.0))
    except RankError as error:
        results.put((str(error), time.monotonic() - begun))


PLACED = r"rank 0, at {}, lost a rank while waiting for all of them; rank 1 was last heard of \d+ s ago, at .*"


@pytest.mark.parametrize(
    ("at", "fate", "said"),
    [
        ("timeline", "killed", PLACED.format("the timeline")),
        ("timeline", "silent", PLACED.format("the timeline")),
        ("data", "killed", PLACED.format("the comparison of data")),
        ("groups", "killed", r"rank 0 waited for all ranks to start: .*"),
    ],
)
def test_a_rank_that_is_lost_between_steps_is_no_traceback(at: str, fate: str, said: str) -> None:
    message, took_s = _told_by_rank_0(_between, at, fate)
    assert took_s < 15
    assert re.fullmatch(said, message), message


def _without_groups() -> str:
    """On a rank: no group can be made of two directions."""
    mesh = device_mesh(sized(pp=2, dp=2))

    def flatten(self: DeviceMesh) -> DeviceMesh:
        raise RuntimeError("a peer\nis gone")

    made, DeviceMesh._flatten = DeviceMesh._flatten, flatten  # type: ignore[method-assign, assignment]
    try:
        Mesh(mesh, 4)
    except RankError as error:
        return str(error)
    finally:
        DeviceMesh._flatten = made  # type: ignore[method-assign]
    return "made"


def test_groups_that_cannot_be_made_are_one_line(four_ranks: Ranks) -> None:
    said = [f"rank {rank} waited for all ranks to start: a peer is gone" for rank in range(4)]
    assert four_ranks.run(_without_groups) == said
