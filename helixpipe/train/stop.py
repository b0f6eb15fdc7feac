"""Stop: a run that is asked to end finishes its step, writes a checkpoint and ends with a code of its own.

    SIGTERM   clusters and torchrun send it before they kill
    SIGUSR1   Slurm's warning: sbatch --signal=USR1@120
    SIGINT    Ctrl-C; a second one ends the run at once

All ranks stop after the same step, whichever of them was asked.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""The exit code of a run that stopped as asked: a temporary failure (EX_TEMPFAIL), so the same command goes on with --resume."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Stop:
    """`asked`: the signal that came, 0 while none has."""

    def __init__(self) -> None:
        self.asked = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals, those too that came while the process started."""
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
