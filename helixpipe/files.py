"""Text files read and written whole: one-line errors, and never half a file."""

from __future__ import annotations

import os
from pathlib import Path

from helixpipe.errors import HelixpipeError


def read_text(path: str | os.PathLike[str], kind: type[HelixpipeError] = HelixpipeError) -> str:
    """The text of a UTF-8 file; raises `kind` when it is missing, empty, unreadable or not text."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise kind(f"{path}: cannot be read: {_reason(error)}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise kind(f"{path}: the file is empty")
    return text


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file so that at every instant it is the old one or the new one, whole. Raises HelixpipeError."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():  # a pipe or a terminal takes text as it comes
            target.write_text(text, encoding="utf-8")
            return
        target = target.resolve()  # a link stays a link
        beside = target.with_name(f".helixpipe-{os.getpid()}.tmp")
        try:
            with beside.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise HelixpipeError(f"{path}: cannot be written: {_reason(error)}") from None


def fault(path: str | os.PathLike[str]) -> str:
    """Why nothing can be at a path (a name too long, no permission); "" where something is, or could be."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return (text or str(error)).lower()
