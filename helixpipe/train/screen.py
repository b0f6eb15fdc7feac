"""Screen: lines on standard error, and on a terminal a last one that is renewed and never wraps."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_BETWEEN = "  "
# columns of a terminal from which on the bar is whole
_WIDE = 120


class Screen:
    """Of a run of so many steps."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            console = Console(stderr=True)
            fixed = Column(no_wrap=True)
            columns = (
                TextColumn("step", table_column=fixed),
                MofNCompleteColumn(table_column=fixed.copy()),
                BarColumn(16 if console.width >= _WIDE else 8, table_column=fixed.copy()),
                TimeRemainingColumn(compact=True, table_column=Column(min_width=5, no_wrap=True)),
                _FieldsColumn(),
            )
            self._progress = Progress(*columns, console=console)
            self._progress.add_task("train", total=steps, completed=done, fields=Fields(()))
            self._progress.start()

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def step(self, step: int, fields: Sequence[str]) -> None:
        """What a step gave, what matters most first: on a terminal as much of it as there is room for."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, fields=Fields(fields))
        else:
            self.say(f"step {step}/{self._steps}  {_BETWEEN.join(fields)}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Fields:
    """Pieces of a line, as many from the first on as there is room for."""

    def __init__(self, fields: Sequence[str]) -> None:
        self.fields = fields

    def fitted(self, width: int) -> str:
        line = ""
        for field in self.fields:
            longer = f"{line}{_BETWEEN}{field}" if line else field
            if len(longer) > width:
                break
            line = longer
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.fitted(options.max_width), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, len(_BETWEEN.join(self.fields)))


class _FieldsColumn(ProgressColumn):
    """What is left of the line."""

    def render(self, task: Task) -> Fields:
        found = task.fields["fields"]
        assert isinstance(found, Fields)
        return found
