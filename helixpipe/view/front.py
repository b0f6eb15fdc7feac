r"""A plan as a picture: step time against the fullest rank's memory, a dot for each choice, and the Pareto front.

step  |  o       .
      |   \   .   .
      |    o----.------o        the front: nothing is better in both
      |________________________
                   memory | limit
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from html import escape

from helixpipe.errors import ConfigError
from helixpipe.predict.choices import Choice
from helixpipe.predict.plan import Plan
from helixpipe.view.palette import oklch

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1240, 640, 84, 440, 64, 64
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
STYLE = f"text{{font-family:{FONT};font-size:12px;fill:#222}}.h{{font-size:16px;font-weight:600}}.m{{fill:#666}}.c{{text-anchor:middle}}.e{{text-anchor:end}}"
LABELLED = 6
OPTIONS_WIDTH = 62
"""Letters of a choice's options in a line of the legend."""
SLOWEST = 2.0
"""Choices that take more than so many times the fastest are not shown."""


def picture(plan: Plan, title: str) -> str:
    """The drawing. Hovering over a dot tells its choice. Raises ConfigError for a plan that nothing fits."""
    if not plan.fits:
        raise ConfigError(plan.nothing)
    everyone = [c for c in (*plan.fits, *plan.misses) if c.makespan_s <= SLOWEST * plan.fits[0].makespan_s]
    drawing = _Drawing(plan, everyone)
    body = "\n".join([*drawing.axes(), *drawing.limit(), *drawing.dots(), *drawing.front(), *drawing.legend()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">\n'
        f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        f'<text x="{LEFT}" y="28" class="h">{escape(title)}</text>\n'
        f'<text x="{LEFT}" y="48" class="m">{len(plan.fits)} choices fit; the line joins those that none beats in both</text>\n'
        f"{body}\n</svg>\n"
    )


class _Drawing:
    """x from memory (a power scale when it spans decades), y from step time."""

    def __init__(self, plan: Plan, choices: list[Choice]) -> None:
        self.plan, self.choices = plan, choices
        memory = [choice.peak_bytes for choice in choices]
        times = [choice.makespan_s for choice in choices]
        self.least_bytes, self.most_bytes = min(memory) / 1.15, max(memory) * 1.15
        pad = (max(times) - min(times) or max(times)) * 0.06
        self.least_s, self.most_s = min(times) - pad, max(times) + pad
        families = list(dict.fromkeys(choice.candidate.family for choice in choices))
        self.colours = {
            family: oklch(0.45 + 0.22 * (i % 2), 0.15, 360 * i / len(families)) for i, family in enumerate(families)
        }

    def x(self, nbytes: float) -> float:
        share = math.log(nbytes / self.least_bytes) / math.log(self.most_bytes / self.least_bytes)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, seconds: float) -> float:
        return HEIGHT - BOTTOM - (seconds - self.least_s) / (self.most_s - self.least_s) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> Iterator[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for nbytes in _powers(self.least_bytes, self.most_bytes):
            x = f"{self.x(nbytes):.1f}"
            yield f'<path d="M{x} {TOP}V{bottom}" stroke="#eee"/>'
            yield f'<text x="{x}" y="{bottom + 18}" class="m c">{_bytes(nbytes)}</text>'
        for seconds in _ticks(self.least_s, self.most_s):
            y = f"{self.y(seconds):.1f}"
            yield f'<path d="M{LEFT} {y}H{right}" stroke="#eee"/>'
            yield f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" class="m e">{seconds:.4g} s</text>'
        yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="#999" fill="none"/>'
        yield f'<text x="{(LEFT + right) / 2}" y="{bottom + 40}" class="c">bytes on the fullest rank</text>'
        yield f'<text transform="translate(20 {(TOP + bottom) / 2}) rotate(-90)" class="c">step time</text>'

    def limit(self) -> Iterator[str]:
        """Where the memory ends."""
        limit = self.plan.memory_bytes
        if self.least_bytes < limit < self.most_bytes:
            x = self.x(limit)
            yield f'<rect x="{x:.1f}" y="{TOP}" width="{WIDTH - RIGHT - x:.1f}" height="{HEIGHT - TOP - BOTTOM}" fill="#f6e9e6"/>'
            yield f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#b33" stroke-dasharray="4 3"/>'
            yield f'<text x="{x + 6:.1f}" y="{TOP + 14}" fill="#b33">does not fit</text>'

    def dots(self) -> Iterator[str]:
        for choice in reversed(self.choices):
            x, y, fill = self.x(choice.peak_bytes), self.y(choice.makespan_s), self.colours[choice.candidate.family]
            told = f"{choice}: {choice.makespan_s:.4g} s, {_bytes(choice.peak_bytes)} on rank {choice.fullest}"
            shape = (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"'
                if choice.is_pipeline
                else f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
            )
            yield f'{shape} fill="{fill}" fill-opacity="0.8"><title>{escape(told)}</title></{shape[1:].split()[0]}>'

    def front(self) -> Iterator[str]:
        """The front's line, and a ring round each of its choices."""
        front = [choice for choice in self.plan.front if choice.makespan_s <= self.most_s]
        points = [(self.x(choice.peak_bytes), self.y(choice.makespan_s)) for choice in front]
        if not points:
            return
        yield f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" fill="none" stroke="#222" stroke-width="1.2"/>'
        for number, (x, y) in enumerate(points, start=1):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6.5" fill="none" stroke="#222" stroke-width="1.4"/>'
            if number <= LABELLED:
                yield f'<text x="{x:.1f}" y="{y + 20:.1f}" class="c">{number}</text>'

    def legend(self) -> Iterator[str]:
        """Families by colour, then the first choices of the front in words."""
        x, y = WIDTH - RIGHT + 24, TOP + 6
        for family, fill in self.colours.items():
            square = next(not c.is_pipeline for c in self.choices if c.candidate.family == family)
            yield (
                f'<rect x="{x - 4}" y="{y - 8}" width="8" height="8" fill="{fill}"/>'
                if square
                else f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{fill}"/>'
            )
            yield f'<text x="{x + 12}" y="{y}">{escape(family)}</text>'
            y += 17
        y += 12
        yield f'<text x="{x - 4}" y="{y}" class="m">the front</text>'
        for number, choice in enumerate(self.plan.front[:LABELLED], start=1):
            y += 16
            words = str(choice).split(", ")
            yield f'<text x="{x - 4}" y="{y}">{number} {escape(words[0])}</text>'
            for line in textwrap.wrap(", ".join(words[1:]), OPTIONS_WIDTH):
                y += 14
                yield f'<text x="{x + 10}" y="{y}" class="m" style="font-size:10px">{escape(line)}</text>'


def _powers(least: float, most: float) -> Iterator[float]:
    """Powers of two in bytes, at most about eight of them."""
    step = max(1, round(math.log2(most / least) / 8))
    for power in range(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1, step):
        yield 2.0**power


def _ticks(least: float, most: float) -> Iterator[float]:
    """About six round numbers."""
    raw = (most - least) / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= raw)
    for i in range(math.ceil(least / step), math.floor(most / step) + 1):
        yield i * step


def _bytes(nbytes: float) -> str:
    for size, unit in ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"
