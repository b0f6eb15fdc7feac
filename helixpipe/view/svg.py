"""A timeline as SVG: rectangles written by hand.

    title
    makespan, bubble, what it is
    rank 0  |F0|F1|F2|      |B0 |F3|B1 |   |          light: forward, dark: backward; hue: the micro-batch
            ~~live bytes~~~~~~~~~~~~~~~~~~~           under each rank, when the timeline has memory
    rank 1     |F0|F1|  |B0 |...
            0 units  5        10        15
            legend

A dark line under an action marks a stage that several ranks run. Hovering over an action tells it whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.schedule.action import Action
from helixpipe.view.palette import NAMES, TONES, colour, dark, oklch

WIDTH, LEFT, RIGHT, TOP = 1200, 64, 24, 66
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
LETTER = 5.5  # width of a letter at the labels' size
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
BYTES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
ACTIVATIONS, BUFFERS, MARK = oklch(0.65, 0.10, 250), oklch(0.82, 0.07, 250), "#333"
MOVING = "on several ranks"
# what an action's rectangle looks like beyond its colour
STYLE = (
    f"text{{font-family:{FONT};font-size:12px;fill:#222}}.s{{font-size:9px;text-anchor:middle}}"
    ".s.d{fill:#fff}.h{font-size:16px;font-weight:600}.m{fill:#666}.r{text-anchor:end}.c{text-anchor:middle}.b{font-size:9px}"
)


def render(timeline: Timeline, title: str, unit: str = "s") -> str:
    """The drawing. `unit` names the timeline's unit of time: seconds are shown at a fitting scale, others as they are."""
    drawing = _Drawing(timeline, unit)
    body = [*drawing.head(title)]
    for rank in range(timeline.ranks):
        body += drawing.row(rank)
    body += [*drawing.axis(), *drawing.foot()]
    height = drawing.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" height="{_n(height)}"'
        f' role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{_n(height)}" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


class _Drawing:
    """Where things go: x from time, y from rank, and the parts of the picture as lines of SVG."""

    def __init__(self, timeline: Timeline, unit: str) -> None:
        self.timeline = timeline
        self.bar = 28.0 if timeline.ranks <= 8 else max(12.0, 28 - (timeline.ranks - 8))
        self.has_memory = any(timeline.memory)
        self.curve = 34.0 if self.has_memory else 0.0
        self.step = self.bar + self.curve + (6.0 if self.bar > 16 else 3.0)
        self.bottom = TOP + self.step * timeline.ranks
        self.height = self.bottom + 60
        self.per_s = (WIDTH - LEFT - RIGHT) / (timeline.makespan_s or 1.0)
        scale, name = _fitting(timeline.makespan_s, SECONDS) if unit == "s" else (1.0, unit)
        self.time_scale, self.time_unit = scale, name
        self.microbatches = 1 + max((s.action.microbatch for spans in timeline.spans for s in spans), default=0)
        stages = [len({span.action.stage for span in spans}) for spans in timeline.spans]
        self.one_stage = max(stages, default=0) <= 1
        ranks_of: dict[int, set[int]] = {}
        for rank, spans in enumerate(timeline.spans):
            for span in spans:
                ranks_of.setdefault(span.action.stage, set()).add(rank)
        self.moving = {stage for stage, ranks in ranks_of.items() if len(ranks) > 1}
        self.kinds = {span.action.kind for spans in timeline.spans for span in spans}

    def x(self, time_s: float) -> float:
        return LEFT + time_s * self.per_s

    def time(self, time_s: float) -> str:
        return f"{time_s / self.time_scale:.4g}"

    def head(self, title: str) -> Iterator[str]:
        """Title and caption."""
        timeline = self.timeline
        yield f'<text x="{LEFT}" y="28" class="h">{escape(title)}</text>'
        facts = [
            f"makespan {self.time(timeline.makespan_s)} {self.time_unit}",
            f"bubble {100 * timeline.bubble_ratio:.1f}%",
            _count(timeline.ranks, "rank"),
            _count(self.microbatches, "micro-batch"),
        ]
        if self.has_memory:
            facts.append(f"peak {_bytes(max(timeline.peak_activation_bytes))} of activations")
        yield f'<text x="{LEFT}" y="50" class="m">{escape(" · ".join(facts))}</text>'

    def foot(self) -> Iterator[str]:
        """The legend, under the axis."""
        x, y = float(LEFT), self.bottom + 44
        for name, fills in self.legend():
            for i, fill in enumerate(fills):
                yield f'<rect x="{_n(x + 12 * i)}" y="{_n(y - 10)}" width="11" height="12" fill="{fill}"/>'
            if name == MOVING:
                yield f'<path d="M{_n(x)} {_n(y + 0.5)}h11" stroke="{MARK}" stroke-width="3"/>'
            x += 12 * len(fills) + 5
            yield f'<text x="{_n(x)}" y="{_n(y)}" class="m">{name}</text>'
            x += 7.3 * len(name) + 24

    def legend(self) -> list[tuple[str, list[str]]]:
        """Name -> the colours of its swatches, for what is in the picture."""
        found = [(NAMES[kind], [colour(kind, i, 3) for i in range(3)]) for kind in TONES if kind in self.kinds]
        found += [(MOVING, ["#ddd"])] if self.moving else []
        buffers = any(point.transit_bytes for points in self.timeline.memory for point in points)
        found += [("activations", [ACTIVATIONS])] if self.has_memory else []
        return found + ([("message buffers", [BUFFERS])] if buffers else [])

    def row(self, rank: int) -> Iterator[str]:
        """One rank: its name, the idle time behind, its actions, and its memory."""
        y = TOP + self.step * rank
        width = _n(self.x(self.timeline.makespan_s) - LEFT)
        yield f'<text x="{LEFT - 8}" y="{_n(y + self.bar / 2 + 4)}" class="r">rank {rank}</text>'
        yield f'<rect x="{LEFT}" y="{_n(y)}" width="{width}" height="{_n(self.bar)}" fill="#f1f1f1"/>'
        for span in self.timeline.spans[rank]:
            yield from self.action(span, y)
        marks = [
            f"M{_n(self.x(a))} {_n(y + self.bar - 1.5)}H{_n(self.x(b) - self.gap(a, b))}"
            for action, a, b, _ in self.timeline.spans[rank]
            if action.stage in self.moving
        ]
        if marks:
            yield f'<path d="{"".join(marks)}" stroke="{MARK}" stroke-width="3" pointer-events="none"/>'
        if self.has_memory:
            yield from self.memory(self.timeline.memory[rank], y + self.bar + 1)

    def gap(self, start_s: float, end_s: float) -> float:
        """What is left white after an action, when it is wide enough to spare it."""
        return 0.8 if (end_s - start_s) * self.per_s > 4 else 0.0

    def action(self, span: Span, y: float) -> Iterator[str]:
        """A rectangle with its hover text, and a label where one fits."""
        action, x, end = span.action, self.x(span.start_s), self.x(span.end_s)
        width = max(0.3, end - x - self.gap(span.start_s, span.end_s))
        hover = f"{action}  {self.time(span.start_s)} to {self.time(span.end_s)} {self.time_unit}"
        hover += f", waited for {span.awaited}" if span.awaited else ""
        fill = colour(action.kind, action.microbatch, self.microbatches)
        yield (
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(self.bar)}" fill="{fill}">'
            f"<title>{escape(hover)}</title></rect>"
        )
        text = self.label(action, width)
        if text:
            ink = "s d" if dark(action.kind) else "s"
            yield f'<text x="{_n(x + width / 2)}" y="{_n(y + self.bar / 2 + 3)}" class="{ink}">{text}</text>'

    def label(self, action: Action, width: float) -> str:
        """`F0.1`; `.1` where there is no room for more, since F0 stands before it; nothing where there is none."""
        told = [str(action)[len(str(action.stage)) :] if self.one_stage else str(action)]
        told += [f".{action.segment}"] if action.segment else []
        return next((text for text in told if len(text) * LETTER + 1 <= width and self.bar >= 12), "")

    def memory(self, points: Sequence[MemoryPoint], y: float) -> Iterator[str]:
        """Live bytes by time, all ranks on one scale: activations, of them message buffers on top."""
        height = self.curve - 4
        most = max(self.timeline.peak_activation_bytes, default=0) or 1
        for buffers, fill in ((True, BUFFERS), (False, ACTIVATIONS)):
            path = [f"M{_n(self.x(0))} {_n(y + height)}"]
            for point in points:
                total = point.activation_bytes - (0 if buffers else point.transit_bytes)
                path.append(f"H{_n(self.x(point.time_s))}V{_n(y + height - height * total / most)}")
            path.append(f"H{_n(self.x(self.timeline.makespan_s))}V{_n(y + height)}Z")
            if not buffers or any(point.transit_bytes for point in points):
                yield f'<path d="{"".join(path)}" fill="{fill}"/>'
        peak = max((point.activation_bytes for point in points), default=0)
        yield f'<text x="{LEFT - 8}" y="{_n(y + height / 2 + 4)}" class="r m b">{_bytes(peak)}</text>'

    def axis(self) -> Iterator[str]:
        """Ticks at round times, and the unit."""
        y, end = self.bottom + 4, self.timeline.makespan_s
        yield f'<line x1="{LEFT}" y1="{_n(y)}" x2="{_n(self.x(end))}" y2="{_n(y)}" stroke="#999"/>'
        step = _round_step(end / self.time_scale / 10) * self.time_scale
        for i in range(int(end / step + 1e-9) + 1 if end else 1):
            x = self.x(i * step)
            yield f'<line x1="{_n(x)}" y1="{_n(y)}" x2="{_n(x)}" y2="{_n(y + 4)}" stroke="#999"/>'
            unit = f" {self.time_unit}" if i == 0 else ""
            yield f'<text x="{_n(x)}" y="{_n(y + 18)}" class="c m">{self.time(i * step)}{escape(unit)}</text>'


def _n(number: float) -> str:
    """A coordinate, two decimals at most."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('h') else 's'}"


def _fitting(number: float, scales: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest scale that `number` reaches."""
    return next((scale for scale in scales if number >= scale[0]), scales[-1])


def _bytes(number: int) -> str:
    scale, name = _fitting(number, BYTES)
    return f"{number / scale:.3g} {name}"


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, the first that is at least `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= least * (1 - 1e-9))
