"""Checkpoints through torch.distributed.checkpoint, keyed by parameter name.

Every rank saves the tensors it owns under names that know no placement (`model.layers.3.qkv.q.weight`), so a
run of any family, mesh or travel option loads what any other saved: what replicas share is written once, and a
parameter that tp divides is part of a DTensor, which is put together or divided anew by whoever loads it. How a folder becomes a
checkpoint, and how it is verified, is in `manifest`.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from helixpipe.train import manifest as manifests
from helixpipe.train.manifest import FileSeal, Manifest

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run. Every rank makes one and calls the same methods.

    `group` must carry Python objects between CPUs (gloo); None is a run of one rank. `folder` is shared by all
    ranks.
    """

    def __init__(self, folder: Path, keep: int, group: dist.ProcessGroup | None, data: tuple[int, ...] = ()) -> None:
        """`data`: what the run trains on, by its fingerprint."""
        self.folder, self.keep, self.group, self.data = folder, keep, group, data
        self.rank = 0 if group is None else dist.get_rank(group)

    def save(self, state: dict[str, Tensor], step: int, config: Config, read: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of what all ranks give, keep the newest ones. `read`: what the manifest says of data read.

        At every instant the last good one is whole. Raises CheckpointError, the same on all ranks, when
        any of them cannot write; the folder is then as it was before.
        """
        temporary = self.folder / manifests.temporary_name(step)
        try:
            return self._save(temporary, state, step, config, read or {})
        except CheckpointError as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint of step {step}: {error}; {self._last_good()}") from None

    def _save(self, temporary: Path, state: dict[str, Tensor], step: int, config: Config, read: dict[str, Any]) -> Path:
        self._together(lambda: self._prepare(temporary) if self.rank == 0 else None)
        with quiet(), self._lost():
            try:
                save(
                    dict(state), storage_writer=_Writer(temporary), process_group=self.group, no_dist=self.group is None
                )
            except CheckpointException as error:
                rank, cause = _first(error)
                raise CheckpointError(_blame(rank, "write", cause)) from None
        sealed = self._together(lambda: self._seal(temporary))
        files = {name: seal for each in sealed for name, seal in each.items()}
        made = Manifest(step, dataclasses.asdict(config.shape()), to_table(config), files, self.data, read)
        self._together(lambda: self._finish(temporary, made) if self.rank == 0 else None)
        return self.folder / manifests.folder_name(step)

    def load(self, checkpoint: Path, state: dict[str, Tensor]) -> None:
        """Fill this rank's tensors from a verified checkpoint, whoever saved them; raises CheckpointError on all."""
        self._together(lambda: _read(checkpoint, state), "read")

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        manifests.remove_temporaries(self.folder)
        temporary.mkdir()

    def _seal(self, temporary: Path) -> dict[str, FileSeal]:
        """This rank's files, on the disk for good."""
        mine = sorted(temporary.glob(f"__{self.rank}_*"))
        if self.rank == 0:
            mine.append(temporary / ".metadata")
        return {path.name: manifests.seal(path) for path in mine}

    def _finish(self, temporary: Path, made: Manifest) -> None:
        newest = manifests.finish(temporary, made)
        manifests.prune(newest, self.keep)

    def _last_good(self) -> str:
        found = manifests.checkpoints(self.folder)
        return f"the last good one is {found[-1]}; --resume continues it" if found else "there is no earlier one"

    def _together(self, action: Callable[[], T], doing: str = "write") -> list[T]:
        """Run on every rank; what each gave, by rank. One rank's failure is raised on all, as CheckpointError."""
        mine: tuple[T | None, str]
        try:
            mine = action(), ""
        except (OSError, CheckpointError) as error:
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
            load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
        except CheckpointException as error:
            _, cause = _first(error)
            raise CheckpointError(f"{checkpoint}: {' '.join(str(cause).split())}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks about processes and formats off the user's screen."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
