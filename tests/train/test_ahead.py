from __future__ import annotations

import threading

import pytest

from helixpipe.errors import DataError
from helixpipe.train.ahead import Ahead


def test_what_was_begun_is_made_once_and_elsewhere() -> None:
    made: list[tuple[int, bool]] = []

    def make(step: int) -> int:
        made.append((step, threading.current_thread() is threading.main_thread()))
        return step * step

    with Ahead(make) as ahead:
        assert ahead.of(3) == 9
        ahead.begin(4)
        assert ahead.of(4) == 16
        ahead.begin(5)
        assert ahead.of(7) == 49  # asked for something else
    assert [step for step, _ in made] == [3, 4, 5, 7]
    assert not any(here for _, here in made)


def test_what_goes_wrong_ahead_is_raised_by_the_step_that_asks() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise DataError("data.path: gone")
        return step

    with Ahead(make) as ahead:
        assert ahead.of(1) == 1
        ahead.begin(2)
        with pytest.raises(DataError, match="gone"):
            ahead.of(2)


def test_leaving_waits_for_nothing_that_was_not_begun() -> None:
    begun, gone = threading.Event(), threading.Event()

    def make(step: int) -> int:
        begun.set()
        gone.wait(30)
        return step

    with Ahead(make) as ahead:
        ahead.begin(1)
        assert begun.wait(30)
        ahead.begin(2)
    gone.set()
    ahead._worker.shutdown()
    assert ahead._coming is not None
    assert ahead._coming[1].cancelled()
