"""Lock: one run folder, one writer.

Whoever runs holds a lock on `<run>/lock`, which says who that is; the system lets it go when the process ends, however it ends.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helixpipe.errors import ConfigError
from helixpipe.files import make_folder
from helixpipe.train.job import Job, refuse_used

NAME = "lock"
# of file systems that know no locks
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def claimed(job: Job) -> Iterator[Job]:
    """The job with a run folder that nobody else writes to while this lasts: where it has no other name than a number, the
    next one that is free. A folder that is left with nothing in it is removed. Raises ConfigError that says who has it.
    """
    if job.task != "train":
        yield job
        return
    while True:
        made = _make(job.folder)
        try:
            held = _lock(job)
        except ConfigError:
            if not job.numbered:
                raise
            job = _next(job)
            continue
        try:
            yield job
        finally:
            _leave(job.folder, made)
            os.close(held)
        return


def _make(folder: Path) -> list[Path]:
    """Make a folder; those that were missing, the innermost first."""
    try:
        return make_folder(folder)
    except OSError as error:
        raise ConfigError(f"run.folder: '{folder}' cannot be made: {(error.strerror or str(error)).lower()}") from None


def _lock(job: Job) -> int:
    """The lock's descriptor; raises ConfigError where another process holds it, or has been there."""
    folder = job.folder
    try:
        held = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"run.folder: '{folder}' cannot be written: {(error.strerror or str(error)).lower()}"
        ) from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_there(held, folder / NAME):  # its holder ended, and removed it, between the two calls
            os.close(held)
            return _lock(job)
        if job.checkpoint is None and not job.afresh:  # another may have begun and ended since the job was made ready
            refuse_used(folder)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            who = os.pread(held, 200, 0).decode(errors="replace").strip()
            os.close(held)
            raise ConfigError(
                f"run.folder: '{folder}' is in use by {who or 'another process'}; wait for it or stop it, or choose another folder"
            ) from None
    except ConfigError:
        _leave(folder, [])
        os.close(held)
        raise
    os.ftruncate(held, 0)
    os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return held


def _is_there(held: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except OSError:
        return False


def _leave(folder: Path, made: list[Path]) -> None:
    """Remove the lock while it is held, and folders that were made for nothing."""
    try:
        (folder / NAME).unlink(missing_ok=True)
        for each in made:
            each.rmdir()
    except OSError:
        return  # something is in it


def _next(job: Job) -> Job:
    """The job in the folder of the next number."""
    stem, _, number = job.folder.name.rpartition("-")
    run = dataclasses.replace(job.config.run, folder=str(job.folder.with_name(f"{stem}-{int(number) + 1}")))
    return dataclasses.replace(job, config=dataclasses.replace(job.config, run=run))
