"""Checkpoints through torch.distributed.checkpoint, keyed by parameter name.

Every rank saves the tensors it owns under names that know no placement (`model.layers.3.qkv.q.weight`), so a
run of any family, mesh or travel option loads what any other saved: what replicas share is written once, and a
parameter that tp divides is part of a DTensor, which is put together or divided anew by whoever loads it; so are slices of a
vocabulary that is spread (`sliced`). How a folder becomes a checkpoint, and how it is verified, is in `manifest`; how it is
written while training goes on, in `saver`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from helixpipe.config import Config
from helixpipe.config_text import to_table
from helixpipe.errors import CheckpointError, RankError
from helixpipe.runtime.watch import starting
from helixpipe.train import manifest as manifests
from helixpipe.train.manifest import FileSeal, Manifest
from helixpipe.train.optimizer import UPDATES
from helixpipe.train.sliced import under_whole_names

T = TypeVar("T")


class NotWritten(CheckpointError):
    """A checkpoint that could not be written. The folder is as it was before."""

    def __init__(self, step: int, reason: str, last: Path | None) -> None:
        self.step, self.reason, self.last = step, reason, last
        good = f"the last good one is {last}; --resume continues it" if last else "there is no earlier one"
        super().__init__(f"checkpoint of step {step}: {reason}; {good}")

    @property
    def warning(self) -> str:
        """Of a run that goes on."""
        good = f"the last good one is {self.last.name}" if self.last else "there is no earlier one"
        return f"checkpoint of step {self.step}: {self.reason}; training goes on, and {good}"


class Checkpoints:
    """The checkpoints of one run. Every rank makes one and calls the same methods.

    `group` must carry Python objects between CPUs (gloo); None is a run of one rank. `folder` is shared by all
    ranks.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        group: dist.ProcessGroup | None,
        data: tuple[int, ...] = (),
        keep_every: int = 0,
        keep_hours: float = 0.0,
    ) -> None:
        """`data`: what the run trains on, by its fingerprint. `keep`, `keep_every`, `keep_hours`: see `manifest.prune`."""
        self.folder, self.group, self.data = folder, group, data
        self._keeps = keep, keep_every, keep_hours
        self.rank = 0 if group is None else dist.get_rank(group)
        self.remark = ""
        """What else is to be known of the last one that was saved, on rank 0."""

    def apart(self, timeout: timedelta) -> Checkpoints:
        """The same with a process group of its own, for a thread: collectives of two threads on one group would mix. Collective."""
        found = copy.copy(self)
        if self.group is not None:
            with starting(self.rank):
                ranks = dist.get_process_group_ranks(self.group)
                found.group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        return found

    def manifest(self, step: int, config: Config, read: dict[str, Any] | None = None) -> Manifest:
        """That of a checkpoint which is not yet written: its files are not known. `read`: what it says of data read."""
        return Manifest(step, dataclasses.asdict(config.shape()), to_table(config), {}, self.data, read or {})

    def save(self, state: dict[str, Tensor], step: int, config: Config, read: dict[str, Any] | None = None) -> Path:
        """As `write`, by itself: torch's remarks are kept off the screen."""
        with quiet():
            return self.write(state, self.manifest(step, config, read))

    def write(self, state: dict[str, Tensor], manifest: Manifest, before: Callable[[], None] = lambda: None) -> Path:
        """Write a checkpoint of what all ranks give, verify it, then remove those that are not kept. `before` is called on
        rank 0 right before it counts; its OSError is a reason not to.

        At every instant the last good one is whole. Raises NotWritten, the same on all ranks, when any of them cannot write, or
        what is there is not what was written.
        """
        temporary = self.folder / manifests.temporary_name(manifest.step)
        self.remark = ""
        try:
            return self._write(temporary, state, manifest, before)
        except CheckpointError as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            found: list[Path] = []
            with suppress(OSError):
                found = manifests.checkpoints(self.folder)
            raise NotWritten(manifest.step, str(error), found[-1] if found else None) from None

    def _write(self, temporary: Path, state: dict[str, Tensor], made: Manifest, before: Callable[[], None]) -> Path:
        self._together(lambda: self._prepare(temporary) if self.rank == 0 else None)
        with self._lost():
            try:
                whole = under_whole_names(state)
                save(whole, storage_writer=_Writer(temporary), process_group=self.group, no_dist=self.group is None)
            except CheckpointException as error:
                rank, cause = _first(error)
                raise CheckpointError(_blame(rank, "write", cause)) from None
        sealed = self._together(lambda: self._seal(temporary))
        made = dataclasses.replace(made, files={name: seal for each in sealed for name, seal in each.items()})
        self._together(lambda: self._finish(temporary, made, before) if self.rank == 0 else None)
        return self.folder / manifests.folder_name(made.step)

    def load(self, checkpoint: Path, state: dict[str, Tensor]) -> None:
        """Fill this rank's tensors from a verified checkpoint, whoever saved them; raises CheckpointError on all."""
        self._together(lambda: _read(checkpoint, state), "read")

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        manifests.remove_temporaries(self.folder)
        temporary.mkdir()

    def _seal(self, temporary: Path) -> dict[str, FileSeal]:
        """This rank's files, on the disk for good."""
        mine = sorted(path for path in temporary.iterdir() if path.name.startswith(f"__{self.rank}_"))
        if self.rank == 0:
            mine.append(temporary / ".metadata")
        return {path.name: manifests.seal(path) for path in mine}

    def _finish(self, temporary: Path, made: Manifest, before: Callable[[], None]) -> None:
        before()
        newest = manifests.finish(temporary, made)
        manifests.check_written(newest)
        self.remark = manifests.prune(newest, *self._keeps)

    def _together(self, action: Callable[[], T], doing: str = "write") -> list[T]:
        """Run on every rank; what each gave, by rank. One rank's failure is raised on all, as CheckpointError."""
        mine: tuple[T | None, str]
        try:
            mine = action(), ""
        except Exception as error:  # the others wait to hear of it, whatever it is
            mine = None, _blame(self.rank, doing, error)
        everyone = [mine]
        if self.group is not None:
            everyone = [mine] * dist.get_world_size(self.group)
            with self._lost():
                dist.all_gather_object(everyone, mine, self.group)
        for _, failure in everyone:
            if failure:
                raise CheckpointError(failure)
        return [result for result, _ in everyone]  # type: ignore[misc]

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """What the backend says of a rank that is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"rank {self.rank} lost another rank while all were at a checkpoint") from error


class _Writer(FileSystemWriter):
    """Says what the system said: torch.save turns a full disk into an error about positions in a file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _system_error(error) from None


def _first(error: CheckpointException) -> tuple[int, BaseException]:
    """A rank that failed, and why. torch takes Ctrl-C for a failure too: it is raised again."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    if any(isinstance(behind, KeyboardInterrupt) for cause in causes.values() for behind in _behind(cause)):
        raise KeyboardInterrupt from None
    return next(iter(causes.items()))


def _system_error(error: BaseException) -> BaseException:
    """The OSError behind an error, or the error itself."""
    found = next((behind for behind in _behind(error) if isinstance(behind, OSError)), None)
    return error if found is None else OSError(found.errno, found.strerror)


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    behind: BaseException | None = error
    while behind is not None:
        yield behind
        behind = behind.__cause__ or behind.__context__


def _blame(rank: int, doing: str, error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return f"rank {rank} could not {doing}: {' '.join(reason.split()).lower()}"


def _read(checkpoint: Path, state: dict[str, Tensor]) -> None:
    # without collectives: ranks need not ask for the same names
    with quiet():
        try:
            reader = FileSystemReader(checkpoint)
            there, whole = reader.read_metadata().state_dict_metadata, under_whole_names(state)
            whole = {name: tensor for name, tensor in whole.items() if name in there or not name.startswith(UPDATES)}
            load(whole, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            _, cause = _first(error)
            raise CheckpointError(f"{checkpoint}: {' '.join(str(cause).split())}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks about processes and formats off the user's screen. Of the whole process, so for a thread its maker
    enters it.
    """
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            yield
    finally:
        logger.setLevel(before)
