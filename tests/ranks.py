"""Local ranks for tests: worker processes that start once and run many small jobs."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

CONTEXT = mp.get_context("forkserver")
"""How tests start processes that need torch: forked from one that imported it once, before it had threads or groups."""
# the compiler: trials of plain modules make torch import it
CONTEXT.set_forkserver_preload(["helixpipe.runtime.pipeline", "torch._dynamo"])


def _serve(rank: int, ranks: int, port: int, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    while (job := jobs.get()) is not None:
        function, args = job
        try:
            # as bytes: a queue would pass every tensor as an open file
            results.put((rank, pickle.dumps(function(*args)), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`ranks.run(f, *args)` calls f(*args) on every rank of a gloo group and returns what each gave, by rank."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._results = CONTEXT.Queue()
        self._jobs = [CONTEXT.Queue() for _ in range(ranks)]
        self._processes = [
            CONTEXT.Process(target=_serve, args=(r, ranks, self._store.port, self._jobs[r], self._results), daemon=True)
            for r in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        for jobs in self._jobs:
            jobs.put((function, args))
        found: dict[int, Any] = {}
        for _ in range(self.ranks):
            try:
                rank, value, error = self._results.get(timeout=timeout_s)
            except queue.Empty:
                self.close()
                raise AssertionError(f"ranks {set(range(self.ranks)) - set(found)} gave no answer") from None
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = pickle.loads(value)
        return [found[rank] for rank in range(self.ranks)]

    def close(self) -> None:
        for jobs in self._jobs:
            jobs.put(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_meshes: dict[int, DeviceMesh] = {}  # in a worker: made once, since every rank must make each group


def mesh_of(ranks: int) -> DeviceMesh | None:
    """On a worker: the mesh of the first `ranks`; None on the others."""
    if not _meshes:
        for p in range(1, dist.get_world_size() + 1):
            group = dist.new_group(list(range(p)))
            if dist.get_rank() < p:
                _meshes[p] = DeviceMesh.from_group(group, "cpu", mesh=list(range(p)), mesh_dim_names=("pp",))
    return _meshes.get(ranks)
