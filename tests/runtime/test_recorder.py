"""The recorder on a device whose events come later than the CPU: what it has come to, and for what it waits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from helixpipe.errors import RankError
from helixpipe.predict.timeline import Span
from helixpipe.runtime import recorder as recorders
from helixpipe.runtime.ledger import Held
from helixpipe.runtime.recorder import Recorder, Summary
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.action import Action
from helixpipe.schedule.program import Kind, Message


@dataclass
class Stream:
    """A device's queue of events, of which so many have come, one a millisecond."""

    come: int = 0
    events: list[Any] = field(default_factory=list)

    def record(self) -> Any:
        self.events.append(Event(self, len(self.events)))
        return self.events[-1]


@dataclass
class Event:
    stream: Stream
    place: int

    def query(self) -> bool:
        return self.place < self.stream.come

    def synchronize(self) -> None:
        assert self.query(), "the host would wait"

    def elapsed_time(self, later: Any) -> float:
        return float(later.place - self.place)


def message(number: int, producer: str, consumer: str) -> Message:
    made, read = Action.parse(producer), Action.parse(consumer)
    return Message(number, Kind.VALUES, 1, 0, made, read, ("x.1",), ((1,),))


FIRST, SECOND = Action.parse("0F0"), Action.parse("0B0")
GRADIENT, OTHER = message(0, "1B0", "0B0"), message(1, "1B1", "0B0")


def queued(stream: Stream) -> Recorder:
    """A step that the CPU has handed over whole: events 0 shared, 1 start, 2 asks, 3 ends, 4 asks, 5 and 6 messages, 7 ends."""
    found = Recorder(torch.device("cpu"))
    found._event = stream.record
    found.meet()
    found.start()
    found.asks(FIRST)
    found.ends(Held(5, 1, 3), Held(5, 2))
    found.asks(SECOND)
    found.takes(GRADIENT)
    found.takes(OTHER)
    found.ends(Held(2), Held())
    return found


@pytest.mark.parametrize(
    ("come", "at", "awaited"),
    [
        (0, "action 0F0", None), (3, "action 0F0", None),
        (4, "action 0B0", GRADIENT), (5, "action 0B0", GRADIENT), (6, "action 0B0", OTHER),
        (7, "action 0B0", None), (8, "", None),
    ],
)  # fmt: skip
def test_a_device_is_at_its_last_completed_event(come: int, at: str, awaited: Message | None) -> None:
    stream = Stream(come)
    assert queued(stream).reached() == (at, awaited)


def test_an_action_that_the_cpu_still_hands_over_is_where_the_device_is() -> None:
    stream = Stream(99)
    found = queued(stream)
    found.asks(Action.parse("0F1"))
    assert found.reached() == ("action 0F1", None)


def test_a_device_s_step_is_in_its_own_seconds() -> None:
    found = queued(Stream(99))
    assert found.summary() == Summary(0.001, 0.007, pytest.approx(0.002), 9.0)  # type: ignore[comparison-overlap]
    assert found.spans() == (
        Span(FIRST, 0.001, 0.002),
        Span(SECOND, pytest.approx(0.005), 0.006),  # type: ignore[arg-type]
    )


def test_a_message_that_a_device_stood_waiting_for_is_named() -> None:
    stream = Stream(99)
    found = queued(stream)
    stream.events[5].place, stream.events[6].place, stream.events[7].place = 6, 7, 8
    assert [span.awaited for span in found.spans()] == ["", str(GRADIENT)]


def test_a_device_that_comes_no_further_is_an_error_that_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(None, 0, 2)
    monkeypatch.setattr(recorders, "LOOK_S", 0.0)
    with pytest.raises(RankError) as caught:
        queued(Stream(5)).settle(0.02, watch)
    told = r"rank 0, at action 0B0, waited 0 s for x\.1 of 1B0 from rank 1 to rank 0; rank 1 was never heard of"
    assert re.fullmatch(told, str(caught.value)), caught.value
    with pytest.raises(
        RankError, match=r"^rank 0, at action 0F0, waited 0 s for its device; rank 1 was never heard of$"
    ):
        queued(Stream(3)).settle(0.02, watch)
    queued(Stream(99)).settle(0.02, watch)


def test_others_are_told_where_the_device_is() -> None:
    class Store:
        def __init__(self) -> None:
            self.lines: dict[str, str] = {}

        def set(self, key: str, line: str) -> None:
            self.lines[key] = line

    store, stream = Store(), Stream(4)
    watch = Watch(None, 1, 2)
    watch._store = store  # type: ignore[assignment]
    found = queued(stream)
    watch.reached, watch.doing = lambda: found.reached()[0], "the end of the step"
    watch._tell()
    assert store.lines["watch/1"].endswith(
        " action 0B0, as far as its device has come; its CPU is at the end of the step"
    )
    stream.come = 99
    watch._tell()
    assert store.lines["watch/1"].endswith(" the end of the step")
    assert "device" not in store.lines["watch/1"]
