"""Timelines as Chrome's trace-event JSON, which ui.perfetto.dev and chrome://tracing open.

process  predicted                   a process a timeline
  thread   rank 0  |0F0|0F1|  |0B0|  a thread a rank, a complete event an action, its facts under "args"
  counter  rank 0 bytes              activations and message buffers, in bytes
process  measured
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helixpipe.predict.timeline import MemoryPoint, Span, Standing, Timeline
from helixpipe.view.palette import NAMES

MICROSECONDS = 1e6

Event = dict[str, Any]


def perfetto(timelines: Mapping[str, Timeline], stages: Sequence[str] = ()) -> str:
    """The trace: one event a line. `stages[s]` tells stage s's parts, where known.

    A timeline in units other than seconds is written as if a unit were a second.
    """
    events: list[Event] = []
    thread = 1
    for number, (name, timeline) in enumerate(timelines.items()):
        process = number + 1
        events += [_named("process", name, process), _sorted("process", number, process)]
        for rank, spans in enumerate(timeline.spans):
            events += [_named("thread", f"rank {rank}", process, thread), _sorted("thread", rank, process, thread)]
            events += [_complete(span, stages, process, thread) for span in spans]
            thread += 1  # never the same in two processes: readers take a thread's number for its own
        for rank, points in enumerate(timeline.memory):
            events += _counters(f"rank {rank}", points, process)
        for rank, stands in enumerate(timeline.standing):
            events += _standing(f"rank {rank}", stands, timeline.makespan_s, process)
    lines = ",\n".join(json.dumps(event, separators=(",", ":"), allow_nan=False) for event in events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'


def _named(what: str, name: str, process: int, thread: int = 0) -> Event:
    return {"ph": "M", "name": f"{what}_name", "pid": process, "tid": thread, "args": {"name": name}}


def _sorted(what: str, index: int, process: int, thread: int = 0) -> Event:
    return {"ph": "M", "name": f"{what}_sort_index", "pid": process, "tid": thread, "args": {"sort_index": index}}


def _complete(span: Span, stages: Sequence[str], process: int, thread: int) -> Event:
    """An action. Its end is where the next begins, so the duration is what is between the rounded times."""
    action = span.action
    args: Event = {"stage": action.stage}
    if action.stage < len(stages):
        args["parts"] = stages[action.stage]
    args |= {"pass": NAMES[action.kind], "micro-batch": action.microbatch, "segment": action.segment}
    if span.awaited:
        args["awaited"] = span.awaited
    start, end = _us(span.start_s), _us(span.end_s)
    return {
        "ph": "X",
        "name": str(action),
        "cat": NAMES[action.kind],
        "ts": start,
        "dur": round(end - start, 3),
        "pid": process,
        "tid": thread,
        "args": args,
    }


def _counters(rank: str, points: Sequence[MemoryPoint], process: int) -> Iterator[Event]:
    for point in points:
        held = {
            "kept": point.kept_bytes,
            "workspace": point.workspace_bytes,
            "in transit": point.transit_bytes,
        }
        yield _counter(f"{rank} bytes", point.time_s, held, process)


def _standing(rank: str, stands: Standing, end_s: float, process: int) -> Iterator[Event]:
    """The same at both ends of the step, which draws a line."""
    held = {name.removesuffix("_bytes"): number for name, number in stands._asdict().items()}
    for time_s in (0.0, end_s):
        yield _counter(f"{rank} standing bytes", time_s, held, process)


def _counter(name: str, time_s: float, held: dict[str, int], process: int) -> Event:
    return {"ph": "C", "name": name, "ts": _us(time_s), "pid": process, "args": held}


def _us(time_s: float) -> float:
    """Microseconds, to the nanosecond that a trace can hold."""
    return round(time_s * MICROSECONDS, 3)
