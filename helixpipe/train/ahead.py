"""Ahead: what the next step needs is made in a thread while this one runs.

    step 1    │ read 1 │ forward, backward, update ...  │ 2: there already
    thread             │ read 2, its program │

A batch is a function of the step alone, so what was made ahead is what would have been made then; what goes wrong with it is
raised by the step that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """What `make` gives for a number, one ahead."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._coming: tuple[int, Future[Made]] | None = None
        self._worker = ThreadPoolExecutor(1, "helixpipe-ahead")

    def __enter__(self) -> Ahead[Made]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def begin(self, number: int) -> None:
        """Begin to make what is asked for next."""
        self._coming = number, self._worker.submit(self._make, number)

    def of(self, number: int) -> Made:
        """What was begun for this number, or else made now. Raises what `make` raises."""
        if self._coming is not None and self._coming[0] == number:
            return self._coming[1].result()
        return self._worker.submit(self._make, number).result()
