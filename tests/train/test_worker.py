"""One rank of a job: what ends it is one line that says whose it is."""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from helixpipe.config import Config, RuntimeConfig
from helixpipe.errors import ConfigError, HelixpipeError, RankError
from helixpipe.runtime.oom import out_of_memory
from helixpipe.train import worker
from helixpipe.train.job import Job, prepare
from helixpipe.train.stop import Stop
from helixpipe.train.worker import Place

JOB = Job(Config(runtime=RuntimeConfig(device="cpu", threads=torch.get_num_threads())), None, 0)
ALONE = Place(0, 1, 0, 1)


def _no_cpu_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # more than there are addresses: nothing is touched


def _no_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")


def _no_python_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (_no_cpu_memory, r".*DefaultCPUAllocator: .* 1152921504606846976 bytes.*"),
        (_no_device_memory, "CUDA out of memory."),
        (_no_python_memory, "MemoryError"),
    ],
)
def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], None], said: str) -> None:
    monkeypatch.setattr(worker, "train", lambda job, device, group, stop: ask())
    with pytest.raises(HelixpipeError) as caught:
        worker.work(JOB, ALONE, None, Stop())
    assert re.fullmatch(
        "rank 0 ran out of memory on cpu: lower train.sequence_length or train.microbatch_size, or set runtime.recompute, "
        rf"mlp_chunk and head_chunk \({said}\)",
        str(caught.value),
    ), str(caught.value)


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job, device: str, group: object, stop: Stop) -> None:
        raise RuntimeError("a matrix of the wrong size")

    monkeypatch.setattr(worker, "train", broken)
    with pytest.raises(RuntimeError, match=r"^a matrix of the wrong size$"):
        worker.work(JOB, ALONE, None, Stop())
    assert not out_of_memory(RuntimeError("a matrix of the wrong size"))


def test_a_place_that_torchrun_did_not_tell_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError) as caught:
        worker.join([], pytest.fail, prepare)
    assert str(caught.value) == (
        "environment: 'LOCAL_WORLD_SIZE' is missing or no number; start ranks with torchrun, which sets RANK, WORLD_SIZE, "
        "LOCAL_RANK, LOCAL_WORLD_SIZE"
    )


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The environment of rank 1 on a machine of its own, and the store where rank 0 leaves the job."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    store = dist.HashStore()
    monkeypatch.setattr(worker, "rendezvous", lambda where, timeout: iter([(store, 1, 2)]))
    monkeypatch.setattr(worker, "meet", lambda store, rank, ranks, timeout: store)
    return store


def test_a_machine_without_the_device_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, second_of_two: dist.Store
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(JOB.config, runtime=dataclasses.replace(JOB.config.runtime, device="cuda"))
    second_of_two.set("helixpipe/job", Job(config, None, 0).to_json())
    with pytest.raises(ConfigError) as caught:
        worker.join([], pytest.fail, prepare)
    assert str(caught.value) == "runtime.device: 'cuda', and torch sees none here; use 'auto' or 'cpu'"


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would try for half an hour."""
    with socket.socket() as nobody:  # bound, so that no other takes the port, and silent
        nobody.bind(("127.0.0.1", 0))
        told = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        told |= {"MASTER_PORT": nobody.getsockname()[1], "TORCHELASTIC_USE_AGENT_STORE": True}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(worker, "CONNECT", timedelta(seconds=0.5))
        with pytest.raises(RankError, match=r"^rank 1 did not meet the others: .*timed out after 500ms") as caught:
            worker.join([], pytest.fail, prepare)
    assert "\n" not in str(caught.value)


def test_a_rank_0_that_leaves_no_job_is_one_line(monkeypatch: pytest.MonkeyPatch, second_of_two: dist.Store) -> None:
    monkeypatch.setattr(worker, "default_pg_timeout", timedelta(seconds=0.2))
    with pytest.raises(RankError, match=r"^rank 1 waited for all ranks to start: .*") as caught:
        worker.join([], pytest.fail, prepare)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", JOB.to_json()])
def test_an_error_of_all_ranks_is_said_by_rank_0_alone(
    monkeypatch: pytest.MonkeyPatch, second_of_two: dist.Store, text: str
) -> None:
    def work(*given: object) -> None:
        raise ConfigError("step 3: loss nan")

    monkeypatch.setattr(worker, "work", work)
    second_of_two.set("helixpipe/job", text)
    assert worker.join([], pytest.fail, prepare) == 2
