"""Action: one pass of one stage over one segment of one micro-batch, and its text form."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from helixpipe.errors import ScheduleError


class Pass(StrEnum):
    """What an action does with its stage."""

    F = "F"  # forward
    B = "B"  # full backward: input and weight gradients
    I = "I"  # noqa: E741  input-gradient backward
    W = "W"  # weight-gradient backward
    R = "R"  # recompute, ahead of the backward that would do it


# the passes that hand a gradient on to the stage before
BACKWARD = frozenset({Pass.B, Pass.I})


class Action(NamedTuple):
    """`3F1` is stage 3, forward, micro-batch 1; `3F1.2` its segment 2. torch's notation plus the segment.

    The text leaves segment 0 out, so a schedule of whole sequences reads as torch writes it.
    """

    stage: int
    kind: Pass
    microbatch: int
    segment: int = 0

    def __str__(self) -> str:
        segment = f".{self.segment}" if self.segment else ""
        return f"{self.stage}{self.kind.value}{self.microbatch}{segment}"

    def sibling(self, kind: Pass) -> Action:
        """Another pass of the same stage, micro-batch and segment."""
        return Action(self.stage, kind, self.microbatch, self.segment)

    @staticmethod
    def parse(text: str) -> Action:
        """The action that `str(action)` wrote; raises ScheduleError."""
        match = re.fullmatch(r"([0-9]{1,9})([A-Z]+)([0-9]{1,9})(?:\.([0-9]{1,9}))?", text)
        if not match:
            raise ScheduleError(f"'{text}' is not an action; write one as '3F1', or '3F1.2' for its segment 2")
        if match[2] not in Pass.__members__:
            raise ScheduleError(f"'{text}' has the unknown pass '{match[2]}'; known: {', '.join(Pass)}")
        return Action(int(match[1]), Pass(match[2]), int(match[3]), int(match[4] or 0))
