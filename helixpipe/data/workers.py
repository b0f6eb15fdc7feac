"""Units of work over processes. Which process does a unit changes nothing of what it writes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from multiprocessing import connection, get_context, parent_process
from typing import Any

from helixpipe.data.options import Options
from helixpipe.data.records import Span
from helixpipe.data.shards import Done, Setting, prepare_unit
from helixpipe.data.tokenizer import Source, Tokenizer
from helixpipe.errors import DataError, HelixpipeError

Unit = tuple[int, tuple[Span, ...]]
# how often a worker tells how far it is, at most
_TELL_S = 0.5


@dataclass(frozen=True)
class Job:
    """What makes a tokenizer, and what is done with it."""

    source: Source
    options: Options
    end: int | None
    today: date
    setting: Setting

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.source, self.options, self.end, self.today)


def run(units: Sequence[Unit], workers: int, job: Job, tell: Callable[[int, int], None]) -> Iterator[Done]:
    """What comes of each unit, as they end. Raises the error of the first unit, by position, that has one."""
    workers = min(workers, len(units))
    yield from _here(units, job, tell) if workers < 2 else _Pool(units, workers, job, tell).run()


def _here(units: Sequence[Unit], job: Job, tell: Callable[[int, int], None]) -> Iterator[Done]:
    tokenizer = job.tokenizer() if units else None
    for unit, spans in units:
        assert tokenizer is not None
        yield prepare_unit(unit, spans, tokenizer, job.setting, tell)


class _Pool:
    """Workers that are handed the next unit when they have done one. All end when this is left, however it is left."""

    def __init__(self, units: Sequence[Unit], workers: int, job: Job, tell: Callable[[int, int], None]) -> None:
        self._left, self._tell = list(reversed(units)), tell
        self._busy: dict[Any, int] = {}
        context = get_context("spawn")
        self._processes: dict[Any, Any] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self) -> Iterator[Done]:
        failed: dict[int, HelixpipeError] = {}
        try:
            for pipe in self._processes:
                self._hand_out(pipe)
            while self._busy:
                for pipe in connection.wait(list(self._busy)):
                    kind, value = self._hear(pipe)
                    if kind == "progress":
                        self._tell(*value)
                        continue
                    unit = self._busy.pop(pipe)
                    if kind == "error":  # units before it may have one too, and are waited for
                        failed[unit] = value
                        self._left = [each for each in self._left if each[0] < unit]
                    else:
                        yield value
                    self._hand_out(pipe)
                if failed:
                    self._busy = {pipe: unit for pipe, unit in self._busy.items() if unit < min(failed)}
            if failed:
                raise failed[min(failed)]
        finally:
            for pipe, process in self._processes.items():
                process.terminate()
                process.join()
                pipe.close()

    def _hand_out(self, pipe: Any) -> None:
        if self._left:
            unit = self._left.pop()
            self._busy[pipe] = unit[0]
            with suppress(OSError):  # it has ended, as is heard next
                pipe.send(unit)

    def _hear(self, pipe: Any) -> tuple[str, Any]:
        try:
            kind, value = pipe.recv()
            return kind, value
        except (EOFError, OSError):
            process = self._processes[pipe]
            process.join()
            how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with code {process.exitcode}"
            return "error", DataError(
                f"a worker ended {how} in unit {self._busy[pipe]} (memory?); give the same command again, with fewer --workers"
            )


def _work(pipe: Any, job: Job) -> None:
    """A worker's life: units until there are no more, or nobody who asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command hears it and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tokenizer = job.tokenizer()
        while True:
            unit, spans = pipe.recv()
            progress = _Progress(pipe)
            try:
                done = prepare_unit(unit, spans, tokenizer, job.setting, progress.tell)
                progress.flush()
                pipe.send(("done", done))
            except HelixpipeError as error:
                pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end_with_parent() -> None:
    """End at once when the command is killed: nobody would journal what we write."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _Progress:
    """What was done since it was last told, told not too often."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._bytes, self._tokens, self._told_s = pipe, 0, 0, time.monotonic()

    def tell(self, count_bytes: int, tokens: int) -> None:
        self._bytes, self._tokens = self._bytes + count_bytes, self._tokens + tokens
        if time.monotonic() - self._told_s > _TELL_S:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(("progress", (self._bytes, self._tokens)))
        self._bytes, self._tokens, self._told_s = 0, 0, time.monotonic()
