"""Stragglers: a rank that slows down is told by its own actions, and one that always was slow is not."""

from __future__ import annotations

import random

import pytest

from helixpipe.predict.timeline import Span
from helixpipe.schedule.action import Action
from helixpipe.train.straggler import REMEMBERED, WINDOW, Straggler


def spans(scale: float, draw: random.Random) -> list[Span]:
    """Two micro-batches of two stages, with waits in between; a backward takes twice as long as a forward."""
    found, at = [], 0.0
    for text, seconds in (("0F0", 1.0), ("1F0", 3.0), ("0F1", 1.0), ("1F1", 3.0), ("1B0", 6.0), ("0B0", 2.0)):
        taken = seconds * scale * draw.uniform(0.95, 1.05)
        found.append(Span(Action.parse(text), at, at + taken))
        at += taken + draw.uniform(0, 10)
    return found


def test_a_rank_that_slows_down_is_told_until_it_is_used_to_it() -> None:
    draw, straggler = random.Random(0), Straggler()
    usual = [straggler.ratio(spans(1.0, draw)) for _ in range(50)]
    assert usual[: WINDOW + 1] == [1.0] * (WINDOW + 1)
    assert max(usual) < 1.02
    slow = [straggler.ratio(spans(2.0, draw)) for _ in range(REMEMBERED)]
    assert slow[WINDOW - 1] == pytest.approx(2.0, rel=0.02)
    assert slow[WINDOW // 2 - 1] == pytest.approx(1.5, rel=0.02)  # half of the window
    assert slow[-1] == pytest.approx(1.0, rel=0.02)
    assert straggler.ratio(spans(1.0, draw)) < 1.02


def test_one_kind_of_action_that_is_slow_weighs_as_much_as_it_takes() -> None:
    draw, straggler = random.Random(1), Straggler()
    for _ in range(100):
        straggler.ratio(spans(1.0, draw))
    for _ in range(WINDOW):
        slower = [
            span._replace(end_s=span.start_s + 3 * (span.end_s - span.start_s)) if str(span.action) == "1B0" else span
            for span in spans(1.0, draw)
        ]
        found = straggler.ratio(slower)
    assert found == pytest.approx((16 + 12) / 16, rel=0.02)


def test_what_the_first_steps_take_and_ranks_without_work_say_nothing() -> None:
    draw, straggler, idle = random.Random(2), Straggler(), Straggler()
    first = [straggler.ratio(spans(100.0, draw)) for _ in range(2)]
    assert first == [1.0, 1.0]
    assert max(straggler.ratio(spans(1.0, draw)) for _ in range(3 * WINDOW)) < 1.02
    assert {idle.ratio([]) for _ in range(3 * WINDOW)} == {1.0}
