"""Saver: checkpoints are written in a thread while training goes on.

    step     │ 39 │ 40 │ copy │ 41 │ 42 │ 43 │ ...      weights, buffers and moments, to memory of the CPU
    thread                    │ write │ verify │ prune │

No step waits for the disk but where a checkpoint is due while the one before is still being written. The copies take the same
memory each time. What ranks say to each other in their threads goes through a process group of its own.

A checkpoint that cannot be written costs a line, and the next one is tried: only where the last one of a run is lost the run fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from helixpipe.config import Config
from helixpipe.errors import CheckpointError, RankError
from helixpipe.train.checkpoint import Checkpoints, NotWritten, quiet

# a checkpoint of a big model takes longer than a message may
PATIENCE = 10


class Told(Protocol):
    """Who is told of checkpoints: on every rank, and one of them shows and writes it."""

    def warn(self, line: str) -> None:
        """A line for the user."""

    def record(self, **fields: Any) -> None:
        """A line to compute with."""

    def flush(self) -> None:
        """Put what is recorded so far on the disk for good. Raises OSError."""


class _Writing(NamedTuple):
    step: int
    done: Future[Path]


class Saver:
    """Of one run. All ranks call the same methods at the same steps; `look` and `due` are each rank's own.

    Where its `with` ends, by an error too, the checkpoint that is being written is waited for; not where another rank is lost.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: Config,
        device: str,
        told: Told,
        wait_for: Callable[[str, Future[Path]], Path] = lambda doing, done: done.result(),
    ) -> None:
        """Collective. `wait_for`: see `Pipeline.wait_for`."""
        run = config.run
        self._told, self._wait_for = told, wait_for
        self._background, self._period_s = run.checkpoint_async, run.checkpoint_minutes * 60
        self._manifest = checkpoints.manifest(0, config)  # once: it reads a model's folder
        self._checkpoints = checkpoints
        if self._background:
            self._checkpoints = checkpoints.apart(timedelta(seconds=config.runtime.timeout_s * PATIENCE))
        moves = torch.device(device).type != "cpu"
        self._stager = DefaultStager(StagingOptions(moves, False, False, moves))
        self._writing: _Writing | None = None
        self._since_s = time.monotonic()
        self._quiet = ExitStack()

    def __enter__(self) -> Saver:
        self._quiet.enter_context(quiet())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._quiet:
            lost = isinstance(error, RankError) or not isinstance(error, Exception | None)
            if not lost and (failed := self._ended()) is not None:
                self._told.warn(str(failed))
            self._stager.close()

    def due(self) -> bool:
        """Whether run.checkpoint_minutes have passed since the last one began, by this rank's clock."""
        return 0 < self._period_s <= time.monotonic() - self._since_s

    def save(self, state: Mapping[str, Tensor], step: int, read: dict[str, Any], skipped: int) -> None:
        """Begin a checkpoint of what all ranks give, or write it where nothing is done in the background. What goes wrong is
        told, or raised by `end`. `read`, `skipped`: what the manifest says. Raises RankError.
        """
        if self._writing is not None and not self._writing.done.done():
            self._told.warn(
                f"step {step} waits for the checkpoint of step {self._writing.step}, which is still being written; let "
                "run.checkpoint_every or run.checkpoint_minutes be longer"
            )
        self._go_on()
        self._since_s = time.monotonic()
        mine = self._stager.stage(dict(state)) if self._background else dict(state)
        assert isinstance(mine, dict)  # and no future: it is all copied when training goes on
        manifest, done = replace(self._manifest, step=step, read=read, skipped=skipped), Future[Path]()

        def write() -> None:
            try:
                done.set_result(self._checkpoints.write(mine, manifest, self._told.flush))
            except BaseException as error:
                done.set_exception(error)

        self._writing = _Writing(step, done)
        # a daemon: where a rank is lost, nobody waits for what it was to say
        threading.Thread(target=write, daemon=True, name="helixpipe-checkpoint").start()
        if not self._background:
            with suppress(NotWritten):  # told by whoever looks next
                self._wait_for(f"the checkpoint of step {step}", done)

    def look(self) -> None:
        """Tell of a checkpoint that came to its end, if one has. Raises RankError."""
        if self._writing is not None and self._writing.done.done():
            self._go_on()

    def end(self, why: str = "") -> None:
        """Wait for the last checkpoint of a run. Raises CheckpointError where it could not be written; `why` comes before it."""
        if (failed := self._ended()) is not None:
            raise CheckpointError(f"{why}{failed}")

    def _go_on(self) -> None:
        if (failed := self._ended()) is not None:
            self._told.warn(failed.warning)

    def _ended(self) -> NotWritten | None:
        """Wait for the checkpoint that is being written, if one is; what was wrong with it."""
        if self._writing is None:
            return None
        (step, done), self._writing = self._writing, None
        try:
            self._wait_for(f"the checkpoint of step {step}", done)
        except NotWritten as failed:
            self._told.record(step=step, checkpoint_error=failed.reason)
            return failed
        if self._checkpoints.remark:
            self._told.warn(f"checkpoint of step {step}: it is written, and {self._checkpoints.remark}")
        return None
