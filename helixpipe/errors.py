"""Every error and warning a user can meet. Each message is one line: what, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HelixpipeError(Exception):
    """The base of them all: the commands print it as one line and exit with 2."""


class ConfigError(HelixpipeError):
    """A key, value or combination in a config, on a command line, or in a call that cannot be."""


class ScheduleError(HelixpipeError):
    """A schedule that is wrong.

    Attributes say where: `rank`, `position` in that rank's order, and `action` as text; each None when
    the fault is not at one place (a missing action is nowhere).
    """

    def __init__(
        self,
        reason: str,
        *,
        rank: int | None = None,
        position: int | None = None,
        action: object | None = None,
    ) -> None:
        self.reason, self.rank, self.position = reason, rank, position
        self.action = None if action is None else str(action)
        place = [] if rank is None else [f"rank {rank}"]
        place += [] if position is None else [f"position {position}"]
        place += [] if action is None else [f"action {action}"]
        super().__init__(f"{', '.join(place)}: {reason}" if place else reason)


class DataError(HelixpipeError):
    """Training data that is missing, empty, too short or of the wrong type."""


class CheckpointError(HelixpipeError):
    """A checkpoint that cannot be read or written, or that belongs to another model."""


class RankError(HelixpipeError):
    """A rank that died or stopped answering: the message names it, what was awaited and what it was doing."""


class UncountedWarning(UserWarning):
    """A batch in which no target counts: its loss is 0 and it adds nothing to any gradient."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or the known words when none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
