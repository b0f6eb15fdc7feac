"""What a checkpoint folder says of itself: a manifest written last, without which it does not count.

    <run>/checkpoints/
      step-00000100/        whole: renamed to this name when everything in it was on the disk
        manifest.json       step, model shape, config, what data, and the size and sha256 of every other file
        __0_0.distcp ...    tensors, one file a rank (torch.distributed.checkpoint)
        .metadata           which tensor is where
      .left-step-00000150/  of a course that was left for an earlier checkpoint: removed by the next save
      .bad-step-00000160/   was not on the disk as it was written: removed by the next save that is
      .step-00000200.tmp/   being written, or left behind by a crash: never read, removed by the next save

No torch here: a checkpoint is found and verified before any rank is started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helixpipe.errors import CheckpointError
from helixpipe.parts.shape import ModelShape

NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class FileSeal:
    """What a file must be like."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors."""

    step: int
    """Training steps done."""
    shape: dict[str, Any]
    """The model's, field by field."""
    config: dict[str, dict[str, Any]]
    """The resolved config of the run that wrote it."""
    files: dict[str, FileSeal]
    """Every other file in the folder."""
    data: tuple[int, ...] = ()
    """The fingerprint of what was trained on; of older checkpoints nothing is known."""
    read: dict[str, Any] = field(default_factory=dict)
    """How much of it, and what padding and imbalance cost (`usage`)."""
    skipped: int = 0
    """Of the steps, those whose update was not made."""

    def to_json(self) -> str:
        body = dataclasses.asdict(self) | {"format": _FORMAT}
        return json.dumps(body | {"sha256": _digest(body)}, indent=1, allow_nan=False)


# of a shape, without parameters: how positions are turned, which a run may stretch as it goes on
_MAY_CHANGE = ("rope", "rope_base", "window_rope_base")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_name(step: int) -> str:
    return f".{folder_name(step)}.tmp"


def step_of(checkpoint: Path) -> int:
    """What `folder_name` says."""
    return int(checkpoint.name[len("step-") :])


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a `checkpoints` folder, oldest first; not yet verified."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith("step-") and path.name[5:].isdigit())


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint; raises CheckpointError."""
    path = checkpoint / NAME
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("sha256")
        if body["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: format {body['format']}, and this version reads {_FORMAT}; use the one that wrote it"
            )
        if digest != _digest(body):
            raise ValueError
        files = {name: FileSeal(**seal) for name, seal in body["files"].items()}
        data, read, skipped = tuple(body.get("data", ())), body.get("read", {}), body.get("skipped", 0)
        return Manifest(body["step"], _with_tuples(body["shape"]), body["config"], files, data, read, skipped)
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}; this is no whole checkpoint, choose another") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: corrupted; choose another checkpoint") from None


def verify(checkpoint: Path) -> Manifest:
    """The manifest, once every file is known to be as it says; raises CheckpointError that names the file."""
    manifest = read_manifest(checkpoint)
    for name, expected in manifest.files.items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                raise CheckpointError(
                    f"{path}: {size} bytes where {expected.bytes} were written; choose another checkpoint"
                )
            if seal(path) != expected:
                raise CheckpointError(f"{path}: corrupted, its checksum differs; choose another checkpoint")
        except OSError as error:
            raise CheckpointError(f"{path}: {_reason(error)}; choose another checkpoint") from None
    return manifest


def check_shape(manifest: Manifest, shape: ModelShape, checkpoint: Path, weights_alone: bool = False) -> None:
    """Raise CheckpointError when the checkpoint is of another model. Rotary positions have no weights: they may change.

    `weights_alone`: the optimizer's moments are not needed, so that anything may have been frozen.
    """
    for name, value in dataclasses.asdict(shape).items():
        if name == "frozen" and weights_alone:
            continue
        if name == "frozen" and manifest.shape.get(name, value) != value:  # of what was frozen it has no moments
            was = manifest.config.get("train", {}).get("freeze", [])
            raise CheckpointError(f"{checkpoint}: its train.freeze is {json.dumps(was)}; freeze the same parameters")
        if name in manifest.shape and manifest.shape[name] != value and name not in _MAY_CHANGE:
            if name == "lora":
                was, now = (_lora(each) for each in (manifest.shape[name], value))
                raise CheckpointError(f"{checkpoint}: its train.lora is {was}, and the config's {now}; use the same")
            raise CheckpointError(
                f"{checkpoint}: its model.{name} is {manifest.shape[name]}, and the config's {value}; use the same model"
            )


def _lora(keys: dict[str, Any] | None) -> str:
    """What adapters a model has."""
    return "none" if keys is None else ", ".join(f"{key} {json.dumps(value)}" for key, value in keys.items())


def find_newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest good checkpoint in a `checkpoints` folder; `warn` is told of every bad one passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            return checkpoint, verify(checkpoint)
        except CheckpointError as error:
            what, _, _ = str(error).partition("; ")
            warn(f"a bad checkpoint is passed over: {what}")
    return None


def seal(path: Path) -> FileSeal:
    """Size and checksum of a file as it is on the disk, and it is there for good when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSeal(os.fstat(file.fileno()).st_size, digest)


def finish(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its name: from then on, and only then, it counts. Raises OSError."""
    for name in manifest.files:
        if not (temporary / name).exists():
            raise CheckpointError(
                f"another rank wrote {name}, which is not seen here; share run.folder among all machines"
            )
    with (temporary / NAME).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    final = temporary.parent / folder_name(manifest.step)
    if final.exists():  # a bad one, passed over when this run was resumed
        aside = temporary.parent / f".{final.name}.old.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    temporary.rename(final)
    _sync_folder(temporary.parent)
    return final


def leave_later(folder: Path, step: int) -> list[Path]:
    """Set aside the checkpoints after `step`, from where a run goes on; those that there were. Raises CheckpointError.

    Until the run saves one of its own, the newest is then the one that it came from.
    """
    later = [path for path in checkpoints(folder) if step_of(path) > step]
    for path in reversed(later):
        aside = folder / f".left-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            path.rename(aside)
        except OSError as error:
            raise CheckpointError(f"{path}: {_reason(error)}; it cannot be set aside, remove it") from None
    return later


def check_written(checkpoint: Path) -> None:
    """Read a checkpoint from the disk, not from what the system has of it in memory. Raises CheckpointError where it is not as
    it was written: it is set aside then, and does not count any more.
    """
    try:
        for path in checkpoint.iterdir():
            _forget(path)
        verify(checkpoint)
    except (OSError, CheckpointError) as error:
        what, _, _ = (_reason(error) if isinstance(error, OSError) else str(error)).partition("; ")
        aside = checkpoint.with_name(f".bad-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        raise CheckpointError(
            f"what was written is not what is there, {what}, and is set aside as {aside.name}"
        ) from None


def prune(newest: Path, keep: int, every: int = 0, hours: float = 0.0) -> str:
    """Keep the newest checkpoint and those before it, `keep` in all, and of the older ones those whose step is a multiple of
    `every` and those that are younger than `hours` (0: none). Later ones are of a course this run left. Why some that should
    have gone are still there; "" where none is.
    """
    found, left = checkpoints(newest.parent), []
    at = found.index(newest)
    old = [path for path in found[: max(at + 1 - keep, 0)] if not _stays(path, every, hours)]
    for path in [*old, *found[at + 1 :]]:
        try:
            discard(path)
        except OSError as error:
            left.append(f"{path.name} cannot be removed: {_reason(error)}")
    for pattern in (".left-step-*", ".bad-step-*"):
        for path in newest.parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    remove_temporaries(newest.parent)
    return ", ".join(left)


def _stays(checkpoint: Path, every: int, hours: float) -> bool:
    """Whether a checkpoint that is not among the newest is kept all the same."""
    if every and step_of(checkpoint) % every == 0:
        return True
    try:
        return hours > 0 and time.time() - (checkpoint / NAME).stat().st_mtime < hours * 3600
    except OSError:
        return False  # without a manifest it is none


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; one removed by half does not count any more."""
    aside = checkpoint.parent / f".{checkpoint.name}.old.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what crashes left behind."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _forget(path: Path) -> None:
    """Let the system drop what it holds of a file in memory, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _with_tuples(value: Any) -> Any:
    """As a shape has it, which JSON knows no tuples of."""
    if isinstance(value, dict):
        return {name: _with_tuples(each) for name, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
