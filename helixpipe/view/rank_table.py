"""Timelines as an HTML table: a row a rank; where there are two, one beside the other with their ratio.

                busy [ms]                idle [ms]        ...
          predicted measured ratio   predicted measured ratio
rank 0       40.1     41.0   0.978      12.0     11.5   1.043
mean         ...
most         ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from helixpipe.predict.timeline import Timeline
from helixpipe.view.figures import Scale, byte_scale, time_scale

PERCENT = Scale(0.01, "%")


@dataclass(frozen=True)
class Column:
    """One number of every rank: `values[t][r]` of timeline t; an empty row where that timeline does not know it."""

    name: str
    scale: Scale
    values: tuple[Sequence[float], ...]

    def figure(self, number: float) -> str:
        """Four digits of the largest and as many decimals for all, so that the points stand under one another."""
        shown = [each / self.scale.size for row in self.values for each in row]
        largest = max(map(abs, shown), default=0.0)
        # of whole numbers the mean may be none
        whole = all(math.isclose(each, round(each), abs_tol=1e-9) for each in (*shown, number / self.scale.size))
        decimals = 0 if whole else max(1, 3 - math.floor(math.log10(largest)))
        return f"{number / self.scale.size:.{decimals}f}"


def columns(timelines: Sequence[Timeline], unit: str) -> list[Column]:
    """What the timelines know of their ranks."""
    time = time_scale(max((t.makespan_s for t in timelines), default=0.0), unit)
    activations = tuple(t.peak_activation_bytes for t in timelines)
    peaks = tuple(t.peak_bytes if t.standing and t.memory else () for t in timelines)
    size = byte_scale(max((number for row in (*activations, *peaks) for number in row), default=0))
    found = [
        Column("busy", time, tuple(t.busy_s for t in timelines)),
        Column("idle", time, tuple(t.idle_s for t in timelines)),
        Column("bubble", PERCENT, tuple(tuple(idle / (t.makespan_s or 1.0) for idle in t.idle_s) for t in timelines)),
        Column("peak activations", size, activations),
        Column("peak of all bytes", size, peaks),
    ]
    return [column for column in found if any(column.values)]


def rank_table(timelines: Mapping[str, Timeline], unit: str) -> str:
    """The table. Its last rows are the ranks' mean and the most of any of them."""
    names = list(timelines)
    several = len(names) > 1
    told = columns(list(timelines.values()), unit)
    wide = f' colspan="{len(names) + several}" scope="colgroup"' if several else ' scope="col"'
    over = "".join(f"<th{wide}>{escape(c.name)} <small>[{escape(c.scale.name)}]</small></th>" for c in told)
    under = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*names, "ratio"]) * len(told)
    head = f'<tr><th scope="col"{" rowspan=2" if several else ""}>rank</th>{over}</tr>'
    head += f"<tr>{under}</tr>" if several else ""
    rows = [_row(f"rank {rank}", told, rank) for rank in range(max((t.ranks for t in timelines.values()), default=0))]
    foot = [_row("mean", told, None), _row("most", told, None, most=True)] if len(rows) > 1 else []
    caption = f"Ranks{f'; ratio is {names[0]} / {names[1]}' if several else ''}"
    return (
        f'<div class="scroll" role="region" aria-label="table of ranks" tabindex="0"><table class="{"two" if several else "one"}"><caption>{escape(caption)}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>{chr(10).join(rows)}</tbody>\n<tfoot>{chr(10).join(foot)}</tfoot></table></div>"
    )


def _row(name: str, told: list[Column], rank: int | None, most: bool = False) -> str:
    """A rank's row, or (rank None) that of all ranks."""
    cells = "".join(f"<td>{cell}</td>" for column in told for cell in _cells(column, rank, most))
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _cells(column: Column, rank: int | None, most: bool) -> Iterator[str]:
    """Each timeline's figure, and their ratio when there are two."""
    if rank is None:
        numbers = [(max(row) if most else sum(row) / len(row)) if row else None for row in column.values]
    else:
        numbers = [row[rank] if rank < len(row) else None for row in column.values]
    yield from ("–" if number is None else column.figure(number) for number in numbers)
    if len(numbers) == 2:
        first, second = numbers
        yield f"{first / second:.3f}" if first is not None and second else "–"
