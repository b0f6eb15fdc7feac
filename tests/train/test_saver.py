"""Checkpoints in the background: the state of their step, whole, whatever training does meanwhile, and a fault costs a line."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from ranks import Ranks
from test_checkpoint import load, same, tensors
from test_mesh_checkpoint import SHAPE, optimizer_of, pipeline_of
from torch import Tensor

from helixpipe.config import Config
from helixpipe.errors import CheckpointError, ConfigError, RankError
from helixpipe.train import checkpoint, manifest
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.saver import Saver

pytestmark = pytest.mark.timeout(120)
SIZE = 4


class Told:
    """What a run was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.flushed = 0

    def warn(self, line: str) -> None:
        self.lines.append(line)

    def record(self, **fields: Any) -> None:
        self.records.append(fields)

    def flush(self) -> None:
        self.flushed += 1


def config(**run: Any) -> Config:
    return dataclasses.replace(Config(), run=dataclasses.replace(Config().run, **run))


def saver_of(folder: Path, told: Told, group: dist.ProcessGroup | None = None, keep: int = 9, **run: Any) -> Saver:
    return Saver(Checkpoints(folder, keep, group), config(**run), "cpu", told)


def written(saver: Saver, step: int, count: int = SIZE) -> None:
    """A checkpoint that came to its end, of which nobody was told yet."""
    saver.save(tensors(range(count), step), step, {}, 0)
    assert saver._writing is not None
    wait([saver._writing.done], 60)


class Held:
    """A disk that a thread waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        original = checkpoint.FileSystemWriter.write_data

        def write_data(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            return original(*arguments)

        monkeypatch.setattr(checkpoint.FileSystemWriter, "write_data", write_data)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    disk = Held(monkeypatch)
    yield disk
    disk.open.set()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_of_its_step_whatever_training_does_while_it_is_written(tmp_path: Path, held: Held) -> None:
    told, state = Told(), tensors(range(9), 1)
    with saver_of(tmp_path, told) as saver:
        saver.save(state, 1, {}, 0)
        assert held.reached.wait(60)
        for tensor in state.values():
            tensor.zero_()
        saver.look()  # it is not at its end, and nobody waits
        assert told.flushed == 0
        held.open.set()
        saver.end()
        second = tensors(range(9), 2)
        for name, tensor in state.items():
            tensor.copy_(second[name])
        saver.save(state, 2, {"tokens": 7}, 3)
        saver.end()
    assert same(load(tmp_path / "step-00000001"), tensors(range(9), 1))
    assert same(load(tmp_path / "step-00000002"), tensors(range(9), 2))
    found = manifest.verify(tmp_path / "step-00000002")
    assert (found.step, found.read, found.skipped) == (2, {"tokens": 7}, 3)
    assert (told.lines, told.records, told.flushed) == ([], [], 2)


def test_one_that_is_still_being_written_is_waited_for_and_that_is_said(tmp_path: Path, held: Held) -> None:
    told = Told()
    with saver_of(tmp_path, told) as saver:
        saver.save(tensors(range(2), 1), 10, {}, 0)
        assert held.reached.wait(60)
        threading.Timer(0.05, held.open.set).start()
        saver.save(tensors(range(2), 2), 20, {}, 0)
        assert manifest.verify(tmp_path / "step-00000010").step == 10
        saver.end()
    assert told.lines == [
        "step 20 waits for the checkpoint of step 10, which is still being written; let run.checkpoint_every or "
        "run.checkpoint_minutes be longer"
    ]
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def fails(saver: Saver, error: Exception, disk: Held) -> None:
    with saver:
        saver.save(tensors(range(2), 1), 1, {}, 0)
        assert disk.reached.wait(60)
        raise error


def test_an_error_of_the_run_waits_for_it_and_a_lost_rank_does_not(tmp_path: Path, held: Held) -> None:
    with pytest.raises(RankError):
        fails(saver_of(tmp_path, Told()), RankError("rank 1 is gone"), held)
    assert names(tmp_path) == [".step-00000001.tmp"]
    threading.Timer(0.05, held.open.set).start()
    with pytest.raises(ConfigError):
        fails(saver_of(tmp_path / "other", Told()), ConfigError("a loss that is not finite"), held)
    assert names(tmp_path / "other") == ["step-00000001"]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, steps: tuple[int, ...] = (2,)) -> None:
    """A call that fails in the saves of these numbers."""
    original, count = getattr(owner, name), iter(range(1, 99))

    def call(*arguments: Any) -> Any:
        if next(count) in steps:
            raise FULL
        return original(*arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(checkpoint.FileSystemWriter, "write_data"), (manifest, "seal"), (manifest, "finish"), (Told, "flush")],
)
def test_a_full_disk_costs_a_line_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, background: bool
) -> None:
    # seals are of the two files that are written, then of both when they are verified
    failing(monkeypatch, owner, name, (5,) if name == "seal" else (2,))
    told = Told()
    with saver_of(tmp_path, told, checkpoint_async=background) as saver:
        for step in (1, 2):
            written(saver, step)
        saver.look()
        assert names(tmp_path) == ["step-00000001"]
        saver.save(tensors(range(SIZE), 3), 3, {}, 0)
        saver.end()
    assert told.lines == [
        "checkpoint of step 2: rank 0 could not write: no space left on device; training goes on, and the last good one is "
        "step-00000001"
    ]
    assert told.records == [{"step": 2, "checkpoint_error": "rank 0 could not write: no space left on device"}]
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert same(load(tmp_path / "step-00000003", range(SIZE)), tensors(range(SIZE), 3))


def test_the_last_one_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, checkpoint.FileSystemWriter, "write_data")
    told = Told()
    with saver_of(tmp_path, told) as saver:
        for step in (1, 2):
            written(saver, step)
        with pytest.raises(CheckpointError) as caught:
            saver.end("stopped by SIGTERM, and ")
    assert type(caught.value) is CheckpointError  # a launcher knows it by its name
    assert str(caught.value) == (
        "stopped by SIGTERM, and checkpoint of step 2: rank 0 could not write: no space left on device; the last good one is "
        f"{tmp_path}/step-00000001; --resume continues it"
    )
    assert told.records == [{"step": 2, "checkpoint_error": "rank 0 could not write: no space left on device"}]


def _save_on_four(folder: str) -> tuple[list[str], str, list[str]]:
    """On a rank: three checkpoints, of which rank 2 cannot write the second, and rank 1 fails as no disk does in the last."""
    told, original, rank = Told(), checkpoint.FileSystemWriter.write_data, dist.get_rank()
    broken = {2: (2, FULL), 3: (1, ValueError("a bug"))}

    def write_data(writer: Any, *arguments: Any) -> Any:
        step = int(str(writer.path).rpartition("step-")[2].partition(".")[0])
        who, error = broken.get(step, (-1, FULL))
        if who == rank:
            raise error
        return original(writer, *arguments)

    checkpoint.FileSystemWriter.write_data = write_data  # type: ignore[assignment, method-assign]
    last = ""
    try:
        with saver_of(Path(folder), told, dist.group.WORLD) as saver:
            for step in (1, 2, 3):
                saver.save(tensors(range(rank, rank + 1), step), step, {}, 0)
                dist.all_reduce(torch.ones(1))  # a step's collectives go on beside the thread's
            saver.end()
    except CheckpointError as error:
        last = str(error)
    finally:
        checkpoint.FileSystemWriter.write_data = original  # type: ignore[method-assign]
    return told.lines, last, [each["checkpoint_error"] for each in told.records]


def test_a_rank_that_fails_and_others_that_do_not_are_of_one_mind(tmp_path: Path, four_ranks: Ranks) -> None:
    found = four_ranks.run(_save_on_four, str(tmp_path))
    reasons = ["rank 2 could not write: no space left on device", "rank 1 could not write: a bug"]
    for lines, last, records in found:
        assert records == reasons
        assert [line for line in lines if "waits for" not in line] == [
            f"checkpoint of step 2: {reasons[0]}; training goes on, and the last good one is step-00000001"
        ]
        assert last.startswith(f"checkpoint of step 3: {reasons[1]}; the last good one is {tmp_path}/step-00000001;")
    assert names(tmp_path) == ["step-00000001"]
    assert manifest.verify(tmp_path / "step-00000001").step == 1


def _trained_and_saved(name: str, folder: str, background: bool) -> list[float]:
    """On a rank of a mesh: losses of steps of which each leaves a checkpoint."""
    pipeline = pipeline_of(name, seed=1)
    optimizer, losses = optimizer_of(name, pipeline), []
    saver = saver_of(Path(folder), Told(), dist.group.WORLD, checkpoint_async=background)
    with saver:
        for step in range(2):
            pipeline.zero_gradients()
            losses.append(pipeline.step(*batch(SHAPE, 4, 8, seed=step)))
            optimizer.step(step)
            saver.save(optimizer.state(step + 1), step + 1, {}, 0)
        saver.end()
    pipeline.close()
    return losses


@pytest.mark.parametrize("name", ["pp2 dp2", "pp2 tp2"])
def test_in_the_background_or_not_every_bit_is_the_same(tmp_path: Path, four_ranks: Ranks, name: str) -> None:
    found = [four_ranks.run(_trained_and_saved, name, str(tmp_path / str(each)), each) for each in (True, False)]
    assert found[0] == found[1]
    for step in (1, 2):
        one, other = (manifest.verify(tmp_path / str(each) / f"step-{step:08d}") for each in (True, False))
        tensors_of = [{n: s for n, s in made.files.items() if n.endswith(".distcp")} for made in (one, other)]
        assert tensors_of[0] == tensors_of[1]
        assert tensors_of[0]


def _spoiled(original: Callable[..., Path]) -> Callable[..., Path]:
    """The disk keeps something else than it was given, once."""
    spoiled: list[Path] = []

    def finish(*arguments: Any) -> Path:
        path = original(*arguments)
        if not spoiled and path.name == "step-00000002":
            spoiled.append(path)
            content = bytearray((path / "__0_0.distcp").read_bytes())
            content[len(content) // 2] ^= 1
            (path / "__0_0.distcp").write_bytes(content)
        return path

    return finish


def test_what_is_not_on_the_disk_as_it_was_written_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "finish", _spoiled(manifest.finish))
    told = Told()
    with saver_of(tmp_path, told, keep=1) as saver:
        for step in (1, 2):
            written(saver, step)
        saver.look()
        assert names(tmp_path) == [".bad-step-00000002", "step-00000001"]
        assert told.lines[-1] == (
            f"checkpoint of step 2: what was written is not what is there, {tmp_path}/step-00000002/__0_0.distcp: corrupted, its "
            "checksum differs, and is set aside as .bad-step-00000002; training goes on, and the last good one is step-00000001"
        )
        saver.save(tensors(range(SIZE), 3), 3, {}, 0)
        saver.end()
    assert names(tmp_path) == ["step-00000003"]


def test_multiples_and_the_young_are_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in range(1, 10):
        path = Checkpoints(tmp_path, 99, None).save(tensors(range(1), step), step, Config())
        age_s = (9 - step) * 3600 + 60  # the newest is a minute old, each before it an hour more
        os.utime(path / manifest.NAME, (time.time() - age_s,) * 2)
    newest = tmp_path / "step-00000009"
    assert manifest.prune(newest, 2, every=3, hours=2.5) == ""
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7, 8, 9)]
    assert manifest.prune(newest, 1, every=3) == ""
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 9)]
    assert manifest.prune(newest, 1) == ""
    assert names(tmp_path) == ["step-00000009"]


def test_an_older_one_that_cannot_be_removed_is_said_and_the_new_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(manifest, "discard", denied)
    told = Told()
    with saver_of(tmp_path, told, keep=1) as saver:
        for step in (1, 2):
            written(saver, step, 1)
        saver.end()
    assert told.lines == ["checkpoint of step 2: it is written, and step-00000001 cannot be removed: permission denied"]
    assert told.records == []


def test_copies_take_the_same_memory_each_time(tmp_path: Path) -> None:
    state: dict[str, Tensor] = tensors(range(3), 1)
    with saver_of(tmp_path, Told()) as saver:
        found = [{name: each.data_ptr() for name, each in saver._stager.stage(dict(state)).items()} for _ in range(2)]
    assert found[0] == found[1]
    assert set(found[0].values()).isdisjoint(each.data_ptr() for each in state.values())
