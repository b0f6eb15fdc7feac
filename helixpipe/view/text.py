"""A schedule or timeline in the terminal: a row per rank, time from left to right.

    rank 0   F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3        a schedule: one column an action
    rank 1   .. F0 F1 .. B0 F2 B1 F3 B2 .. B3
    rank 2   .. .. F0 B0 F1 B1 F2 B2 F3 B3

    rank 0   F0 F1 .. .. .. .. B0--- B1---              a timeline: as long as they take
    rank 1   .. F0 B0--- F1 B1---

Where ranks run several stages a label names the stage too: `1F0`. What is wider than the terminal goes on
below; what would need too many lines is compressed into one band, and a last line says so.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from helixpipe.predict.simulate import simulate_schedule
from helixpipe.predict.timeline import Span, Timeline
from helixpipe.schedule.action import Action
from helixpipe.schedule.schedule import Schedule
from helixpipe.view.palette import colour, dark

MOST_LINES = 60
NARROWEST = 20  # columns for the drawing, however narrow the terminal


class Piece(NamedTuple):
    """Some columns of one row: an action, or standing idle (None)."""

    first: int
    end: int
    action: Action | None
    starts: bool = True  # False when the action began in the band before
    ends: bool = True  # False when it goes on in the next


def staircase(drawn: Timeline | Schedule, width: int | None = None, color: bool = False) -> str:
    """The drawing, lines of at most `width` columns (None: no limit); with `color`, as ANSI text.

    A Schedule is drawn with actions of one unit and messages that take no time, a Timeline by its own clock.
    """
    timeline = drawn if isinstance(drawn, Timeline) else simulate_schedule(drawn, lambda action: 1.0)
    actions = [span.action for spans in timeline.spans for span in spans]
    if not actions or not timeline.makespan_s:
        return "nothing to draw: no action takes any time\n"
    short = all(len({span.action.stage for span in spans}) <= 1 for spans in timeline.spans)
    label_width = max(len(_label(action, short)) for action in actions)
    rows = [f"rank {rank:<{len(str(timeline.ranks - 1))}}   " for rank in range(timeline.ranks)]
    room = None if width is None else max(NARROWEST, width - len(rows[0]))

    quantum = _quantum(timeline)
    cell = label_width + 1
    columns_per_s = cell / (quantum or _typical(timeline))
    columns = math.ceil(timeline.makespan_s * columns_per_s - 1e-6)
    if room is None or columns - 1 <= room:  # the last cell's own gap may hang over
        space = columns
    else:
        space = max(cell, (room + 1) // cell * cell) if quantum else room  # whole cells
    bands = math.ceil(columns / space)
    if quantum:
        space = math.ceil(columns / bands / cell) * cell  # bands of one length
    if bands > 1 and bands * (timeline.ranks + 2) > MOST_LINES:
        space = min(space, room or space)
        slice_s = timeline.makespan_s / space
        body = [(row, _squeezed(spans, slice_s, space)) for row, spans in zip(rows, timeline.spans, strict=True)]
        note = f"compressed: a column is {slice_s:.3g} {'s' if drawn is timeline else 'actions'}; labels are left out\n"
        return _paint(body, actions, color, short) + note
    text = []
    for band in range(bands):
        first = band * space
        at = first / columns_per_s
        head = "" if bands == 1 else f"from {at:.6g} s\n" if drawn is timeline else f"from action {round(at)}\n"
        body = [
            (row, list(_pieces(spans, columns_per_s, first, first + space, cell if quantum else 0)))
            for row, spans in zip(rows, timeline.spans, strict=True)
        ]
        text.append(head + _paint(body, actions, color, short, label_width if quantum else 0))
    return "\n".join(text)


def _label(action: Action, short: bool) -> str:
    """`F0` when its rank runs one stage only, else `1F0`."""
    return str(action)[len(str(action.stage)) :] if short else str(action)


def _quantum(timeline: Timeline) -> float:
    """The unit of which every start and end is a multiple; 0 when there is none worth a column."""
    shortest = min(d for spans in timeline.spans for s in spans if (d := s.end_s - s.start_s) > 0)
    for parts in (1, 2, 3, 4):
        unit = shortest / parts
        counts = (t / unit for spans in timeline.spans for span in spans for t in (span.start_s, span.end_s))
        if all(abs(count - round(count)) < 1e-6 * max(1.0, count) for count in counts):
            return unit
    return 0.0


def _typical(timeline: Timeline) -> float:
    """A duration that nine in ten actions reach: shorter ones lose their label, not the others' room."""
    durations = sorted(d for spans in timeline.spans for s in spans if (d := s.end_s - s.start_s) > 0)
    return durations[len(durations) // 10]


def _pieces(spans: tuple[Span, ...], columns_per_s: float, first: int, end: int, cell: int) -> Iterator[Piece]:
    """One row of one band, without the idle time after the last action; idle cells one by one if there are cells."""
    at = first
    for span in spans:
        a, b = round(span.start_s * columns_per_s), round(span.end_s * columns_per_s)
        if b <= first or a >= end or a == b:
            continue
        starts, ends = a >= first, b <= end
        a, b = max(a, first), min(b, end)
        while at < a:
            idle = min(a, at + cell) if cell else a
            yield Piece(at, idle, None)
            at = idle
        yield Piece(a, b, span.action, starts, ends)
        at = b


def _squeezed(spans: tuple[Span, ...], slice_s: float, columns: int) -> list[Piece]:
    """One column a slice of time, showing what the rank did for most of it."""
    spent: list[dict[Action | None, float]] = [{} for _ in range(columns)]
    for span in spans:
        column = min(columns - 1, int(span.start_s / slice_s))
        while column < columns and column * slice_s < span.end_s:
            inside = min(span.end_s, (column + 1) * slice_s) - max(span.start_s, column * slice_s)
            spent[column][span.action] = max(0.0, inside)
            column += 1
    pieces = []
    for column, found in enumerate(spent):
        found[None] = slice_s - sum(found.values())
        pieces.append(Piece(column, column + 1, max(found, key=lambda action: found[action])))
    while pieces and pieces[-1].action is None:
        pieces.pop()
    return pieces


def _draw(piece: Piece, short: bool, label_width: int) -> tuple[str, str]:
    """The text of a piece, and the gap after it when there is room: `F0`, `B0---`, `...`, or `F` in one column."""
    size = piece.end - piece.first
    room = max(1, size - piece.ends)
    if piece.action is None:
        text = "." * room
    else:
        label = _label(piece.action, short) if piece.starts else ""
        text = label.ljust(label_width if label else 0).ljust(room, "-")[: max(room, len(label))]
        if len(label) > size:
            text = piece.action.kind.value * room
    return text, " " * (size - len(text))


def _paint(
    body: list[tuple[str, list[Piece]]], actions: list[Action], color: bool, short: bool, label_width: int = 0
) -> str:
    """The rows as text. The background is the micro-batch's hue, light for forwards and dark for backwards."""
    if not color:
        plain = (row + "".join(t for piece in pieces for t in _draw(piece, short, label_width)) for row, pieces in body)
        return "".join(line.rstrip() + "\n" for line in plain)
    from rich.console import Console
    from rich.text import Text

    microbatches = 1 + max(action.microbatch for action in actions)
    out = io.StringIO()
    many = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    console = Console(file=out, force_terminal=True, color_system="truecolor" if many else "256", no_color=False)
    for row, pieces in body:
        line, before = Text(row if pieces else row.rstrip()), ""
        for piece in pieces:
            text, gap = _draw(piece, short, label_width)
            style = "bright_black"
            if piece.action is not None:
                ink = "#ffffff" if dark(piece.action.kind) else "#000000"
                style = f"{ink} on {colour(piece.action.kind, piece.action.microbatch, microbatches)}"
            line.append(before).append(text, style)
            before = gap
        console.print(line, soft_wrap=True)
    return out.getvalue()
