"""Skipping: what a run does with a step whose loss or gradient norm is no finite number (`train.on_nonfinite`).

    stop   the run ends
    skip   the update is not made, and the run goes on, but for more such steps in a row than train.nonfinite_limit

A skipped step leaves weights, moments and the optimizer's count of updates as they were; the learning rate, the data and the random
numbers go by the number of the step, and go on. What made the value is looked for either way (`runtime.nonfinite`).
"""

from __future__ import annotations

from helixpipe.config import TrainConfig
from helixpipe.errors import ConfigError

_LOWER = "lower train.learning_rate or train.clip_norm"


class Skipping:
    """The same on all ranks."""

    def __init__(self, settings: TrainConfig, skipped: int) -> None:
        """`skipped`: steps without an update so far."""
        self._settings, self.skipped = settings, skipped
        self._in_a_row = 0

    def passed(self) -> None:
        """A step was as it should be."""
        self._in_a_row = 0

    def skip(self, step: int, loss: float, gradient_norm: float, cause: str) -> str:
        """A step was not finite, because of `cause` ("" where that was not found): a line that says so. Raises ConfigError where
        the run is to end.
        """
        told = f"step {step}: loss {loss:.6g}, gradient norm {gradient_norm:.6g}: " + (
            f"the first value that is not finite came from {cause}"
            if cause
            else "where that came from is not known, since all was finite when the step ran once more"
        )
        if self._settings.on_nonfinite == "stop":
            raise ConfigError(f"{told}; {_LOWER}, or set train.on_nonfinite to skip")
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self._settings.nonfinite_limit:
            raise ConfigError(
                f"{told}; {self._in_a_row} such steps in a row are more than train.nonfinite_limit {self._settings.nonfinite_limit}: "
                f"{_LOWER}"
            )
        return f"{told}; its update is not made"
