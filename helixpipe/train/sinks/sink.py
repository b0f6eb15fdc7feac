"""Sink: a place for numbers by step, in a thread of its own, so that nothing it waits for (a disk, a network) holds a step up.

Log ──write──► queue ──► thread: open_sink(job), then write, write, ...
                                 what goes wrong ends the sink, with one line; never the run
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

from helixpipe.errors import ConfigError

if TYPE_CHECKING:
    from helixpipe.train.job import Job

# name in run.log -> the package that it needs
SINKS = {"tensorboard": "tensorboard", "wandb": "wandb"}
# lines that may wait for a sink before it is given up
MOST_WAITING = 10_000
# how long the end of a run waits for what is still to be written, of all sinks together
CLOSE_S = 10.0
_REASON_LENGTH = 200


class Sink(Protocol):
    """What a file of this room opens."""

    told: str
    """Where the numbers go, in a few words."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def flush(self) -> None:
        """Put what was written where a run that is killed leaves it."""

    def close(self) -> None: ...


Open = Callable[["Job"], Sink]


def check_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError for a sink whose package is not installed."""
    for name in names:
        found = find_spec(SINKS[name])
        if found is None or found.origin is None:  # a folder of that name, such as wandb makes, is no package
            raise ConfigError(
                f"run.log: {name} needs {SINKS[name]}, which is not installed; pip install 'helixpipe[logging]', or leave it out"
            )


def open_sinks(job: Job) -> Sinks:
    """Those that the job's config names. Returns at once."""
    return Sinks([_Thread(name, job, _opener(name)) for name in job.config.run.log])


def _opener(name: str) -> Open:
    def open_sink(job: Job) -> Sink:
        found: Sink = import_module(f"helixpipe.train.sinks.{name}").open_sink(job)
        return found

    return open_sink


class Sinks:
    """Those of a run. Whoever writes asks for `news` now and then."""

    def __init__(self, threads: Sequence[_Thread]) -> None:
        self._threads = threads

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for thread in self._threads:
            thread.write(_Line(step, numbers))

    def news(self) -> list[str]:
        """Lines for the user since the last time."""
        return [line for thread in self._threads for line in thread.news()]

    def close(self) -> list[str]:
        """Wait a while for what is still to be written; the last lines for the user."""
        until = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.write(None)
        for thread in self._threads:
            thread.join(until)
        return self.news()


class _Line(NamedTuple):
    step: int
    numbers: Mapping[str, float]


class _Thread:
    """One sink."""

    def __init__(self, name: str, job: Job, open_sink: Open) -> None:
        self._name, self._job, self._open = name, job, open_sink
        self._lines: queue.Queue[_Line | None] = queue.Queue(MOST_WAITING)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._dropped = threading.Event()
        # a daemon: a network that does not answer must keep no process alive
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"helixpipe-{name}")
        self._thread.start()

    def write(self, line: _Line | None) -> None:
        """A line to write; None is the last one."""
        if self._dropped.is_set():
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._drop(f"it is {MOST_WAITING:,} lines behind")

    def join(self, until: float) -> None:
        """Wait for its end, until that time of the monotonic clock at most."""
        self._thread.join(max(until - time.monotonic(), 0))
        if self._thread.is_alive():
            self._drop(f"it did not end in {CLOSE_S:.0f} s")

    def news(self) -> list[str]:
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def _run(self) -> None:
        try:
            sink = self._open(self._job)
            self._news.put(f"run.log: {self._name} writes to {sink.told}")
            while (line := self._lines.get()) is not None:
                sink.write(*line)
                if self._lines.empty():
                    sink.flush()
            sink.close()
        except BaseException as error:  # whatever a library does, it does it to itself
            reason = " ".join(str(error).split())[:_REASON_LENGTH]
            self._drop(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)

    def _drop(self, why: str) -> None:
        """Once: later faults are of a sink that is dropped already."""
        if not self._dropped.is_set():
            self._dropped.set()
            self._news.put(
                f"run.log: {self._name} is dropped, {why}; the run goes on, and metrics.jsonl has every number"
            )
