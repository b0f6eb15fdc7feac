"""Text files read and written whole: one-line errors, and never half a file. JSON as the standard has it."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from helixpipe.errors import HelixpipeError


def read_text(path: str | os.PathLike[str], kind: type[HelixpipeError] = HelixpipeError) -> str:
    """The text of a UTF-8 file; raises `kind` when it is missing, empty, unreadable or not text."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise kind(f"{path}: cannot be read: {_reason(error)}") from None
    if not text.strip():
        raise kind(f"{path}: the file is empty")
    return text


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file so that at every instant it is the old one or the new one, whole. Raises HelixpipeError."""
    target = Path(path)
    if why := fault(path):
        raise HelixpipeError(f"{path}: cannot be written: {why}")
    try:
        if target.exists() and not target.is_file():  # a pipe or a terminal takes text as it comes
            target.write_text(text, encoding="utf-8")
            return
        target = Path(os.path.realpath(target))  # a link stays a link
        beside = target.with_name(f".helixpipe-{os.getpid()}.tmp")
        try:
            with beside.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise HelixpipeError(f"{path}: cannot be written: {_reason(error)}") from None


def json_text(value: Any, **style: Any) -> str:
    """A value as JSON; a number that is not finite is null, since JSON has no word for it. `style` is json.dumps' own."""
    return json.dumps(_with_nulls(value), allow_nan=False, **style)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(each) for key, each in value.items()}
    return [_with_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def fault(path: str | os.PathLike[str]) -> str:
    """Why nothing can be at a path (a name too long, no permission); "" where something is, or could be."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return _reason(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))) if _is_too_long(path) else ""
    except NotADirectoryError:
        return ""
    except (OSError, ValueError) as error:
        return _reason(error)
    return ""


def _is_too_long(path: str | os.PathLike[str]) -> bool:
    """Whether some folder above a path is missing, so that nobody said yet that a name in it is too long."""
    whole = Path(os.path.abspath(path))
    there = next(each for each in whole.parents if os.path.lexists(each))
    try:
        most = os.pathconf(there, "PC_NAME_MAX")
    except OSError:
        return False
    return any(len(os.fsencode(name)) > most for name in whole.relative_to(there).parts)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; which of them were missing, the innermost first. Raises OSError, and has made none then."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise
    return missing


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return (text or str(error)).lower()
