"""The trace holds every action once, where and when it was, and the live bytes as counters."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from helixpipe.predict.timeline import MemoryPoint, Span, Standing, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.view.perfetto import perfetto


def by_hand(longer: float = 0.0) -> Timeline:
    spans = (
        (
            Span(Action(0, Pass.F, 0), 0.0, 1e-3),
            Span(Action(0, Pass.B, 0), 4e-3, 6e-3 + longer, "x.1 of 1B0 from rank 1 to rank 0"),
        ),
        (Span(Action(1, Pass.F, 0, 2), 1e-3, 2e-3), Span(Action(1, Pass.B, 0, 2), 2e-3, 4e-3)),
    )
    return Timeline(spans, ((MemoryPoint(0.0, 0), MemoryPoint(1e-3, 4096, 512)), ()), (Standing(1, 2, 3),) * 2)


def events(text: str, phase: str) -> list[dict[str, Any]]:
    told = json.loads(text)
    assert set(told) == {"traceEvents", "displayTimeUnit"}
    return [event for event in told["traceEvents"] if event["ph"] == phase]


def test_every_action_is_a_complete_event_in_microseconds() -> None:
    text = perfetto({"predicted": by_hand(), "measured": by_hand(1e-3)}, ["embed norm.0", "head.1"])
    found = events(text, "X")
    assert [(e["name"], e["pid"], e["ts"], e["dur"]) for e in found] == [
        ("0F0", 1, 0, 1000), ("0B0", 1, 4000, 2000), ("1F0.2", 1, 1000, 1000), ("1B0.2", 1, 2000, 2000),
        ("0F0", 2, 0, 1000), ("0B0", 2, 4000, 3000), ("1F0.2", 2, 1000, 1000), ("1B0.2", 2, 2000, 2000),
    ]  # fmt: skip
    assert found[1]["args"] == {
        "stage": 0, "parts": "embed norm.0", "pass": "backward", "micro-batch": 0, "segment": 0,
        "awaited": "x.1 of 1B0 from rank 1 to rank 0",
    }  # fmt: skip
    assert found[2]["args"] == {"stage": 1, "parts": "head.1", "pass": "forward", "micro-batch": 0, "segment": 2}
    assert "parts" not in events(perfetto({"a": by_hand()}), "X")[0]["args"]


def test_a_process_a_timeline_and_a_thread_a_rank_in_order() -> None:
    text = perfetto({"predicted": by_hand(), "measured": by_hand()})
    told = {(e["name"], e["pid"], e["tid"]): next(iter(e["args"].values())) for e in events(text, "M")}
    assert [(key[1], name) for key, name in told.items() if key[0] == "process_name"] == [
        (1, "predicted"),
        (2, "measured"),
    ]
    threads = {key[1:]: name for key, name in told.items() if key[0] == "thread_name"}
    assert list(threads.values()) == ["rank 0", "rank 1"] * 2
    assert len({thread for _, thread in threads}) == 4
    assert [told["thread_sort_index", *thread] for thread in threads] == [0, 1, 0, 1]
    assert [told["process_sort_index", process, 0] for process in (1, 2)] == [0, 1]
    for event in events(text, "X"):
        assert threads[event["pid"], event["tid"]] == f"rank {event['args']['stage']}"


def test_live_bytes_are_counters() -> None:
    found = events(perfetto({"a": by_hand()}), "C")
    assert [(e["name"], e["ts"], e["args"]) for e in found] == [
        ("rank 0 bytes", 0, {"kept": 0, "workspace": 0, "in transit": 0}),
        ("rank 0 bytes", 1000, {"kept": 4096, "workspace": 0, "in transit": 512}),
        *(
            (f"rank {rank} standing bytes", ts, {"weights": 1, "gradients": 2, "optimizer": 3})
            for rank in (0, 1)
            for ts in (0, 6000)
        ),
    ]
    assert events(perfetto({"a": Timeline(by_hand().spans)}), "C") == []


def test_neighbours_meet_at_times_that_no_float_holds() -> None:
    third = 1e-3 / 3
    spans = tuple(Span(Action(0, Pass.F, m), m * third, (m + 1) * third) for m in range(50))
    found = events(perfetto({"a": Timeline((spans,))}), "X")
    for one, next_one in pairwise(found):
        assert one["ts"] + one["dur"] == pytest.approx(next_one["ts"], abs=1e-9)


def test_any_name_is_a_name_and_the_same_input_the_same_text() -> None:
    bad = 'a "b"\\ </script>\n'
    text = perfetto({bad: by_hand()}, [bad])
    assert text == perfetto({bad: by_hand()}, [bad])
    assert events(text, "M")[0]["args"]["name"] == bad
    assert events(text, "X")[0]["args"]["parts"] == bad


def test_nothing_is_an_empty_trace() -> None:
    assert json.loads(perfetto({}))["traceEvents"] == []
    assert events(perfetto({"a": Timeline(((),))}), "X") == []
