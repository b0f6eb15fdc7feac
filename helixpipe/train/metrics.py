"""Metrics: one JSON object a line, appended. A disk that is full now may not be so later: lines that cannot be written wait."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from typing import Any

from helixpipe.files import json_text


class MetricsFile:
    """Of one file. A line is written whole or not at all, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._lock = Lock()  # a checkpoint that is being written flushes from its thread

    def add(self, numbers: dict[str, Any]) -> str:
        """Append a line and those that wait; why that cannot be, "" where it can. A number that
        is not finite is null.
        """
        self._waiting.append(json_text(numbers) + "\n")
        try:
            self._append()
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return ""

    def flush(self) -> None:
        """All lines are on the disk for good when this returns. Raises OSError."""
        self._append()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
            if not waiting:
                return
            with self.path.open("ab", buffering=0) as file:
                begin = file.seek(0, os.SEEK_END)
                try:
                    left = memoryview("".join(waiting).encode())
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(begin)
                    raise
            del self._waiting[: len(waiting)]
