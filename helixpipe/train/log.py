"""Log: what a run shows and writes. Progress goes to standard error, the result to standard output.

<run>/config.toml     the resolved config
      metrics.jsonl   a line per step and per evaluation
      timeline.*      one measured step: .json, .svg, .html (beside its replay), .perfetto.json
      profile/        see `trace`
      checkpoints/    see `manifest`

and what sinks write (see `sinks`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from helixpipe.config import ELEMENT_BYTES, Config
from helixpipe.config_text import write_toml
from helixpipe.errors import HelixpipeError
from helixpipe.files import write_text
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Lengths
from helixpipe.predict.replay import replayed
from helixpipe.predict.timeline import Timeline
from helixpipe.predict.timeline_text import to_json
from helixpipe.schedule.program import Program
from helixpipe.train import manifest as manifests
from helixpipe.train.device import peak_flops_per_s
from helixpipe.train.job import Job
from helixpipe.train.metrics import MetricsFile
from helixpipe.train.record import Metrics, Ranks, StepRecord, scalars
from helixpipe.train.screen import Screen
from helixpipe.train.sinks.sink import Sinks, open_sinks
from helixpipe.train.straggler import SLOW, WINDOW
from helixpipe.view.html import page
from helixpipe.view.perfetto import perfetto
from helixpipe.view.svg import render


class Log:
    """The log of a run. On every rank the same calls; rank 0 alone shows and writes."""

    def __init__(self, job: Job, rank: int, device: str) -> None:
        self.job, self.device, self.speaks = job, device, rank == 0
        self._metrics, self._metrics_fault = MetricsFile(job.folder / "metrics.jsonl"), ""
        self._screen: Screen | None = None
        self._sinks = Sinks(())
        self._peak_flops_per_s: float | None = None
        self._slow: int | None = None
        self._first_held_out: float | None = None
        self._held_out: float | None = None
        self._left: list[Path] = []
        self._end = ""
        self._begun = time.monotonic()

    def __enter__(self) -> Log:
        if self.speaks:
            self._open_folder()
            self._peak_flops_per_s = peak_flops_per_s(self.device, ELEMENT_BYTES[self.job.config.runtime.dtype])
            self._head()
            self._sinks = open_sinks(self.job)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):  # not where somebody wants the end at once
            self._tell_all(self._sinks.close())
        if self._screen is not None:
            self._screen.close()
            self._screen = None
        if self.speaks and kind is None:
            if self._metrics_fault:
                raise HelixpipeError(
                    f"{self._metrics.path}: cannot be written: {self._metrics_fault}; its last lines are lost"
                )
            if self._end:
                self._say(self._end)
            else:
                self._summary()

    def reading(self, line: str) -> None:
        """What is read and how, or what was read."""
        if self.speaks:
            self._say(line)

    def remark(self, line: str) -> None:
        """Something that the rank which knows it says."""
        if line:
            self._say(f"helixpipe: {line}")

    def step(self, record: StepRecord) -> None:
        """One training step: a line to read, a line to compute with."""
        if not self.speaks:
            return
        metrics = Metrics.of(record, self.job.config, self._peak_flops_per_s)
        self._write(metrics.numbers())
        assert self._screen is not None
        self._screen.step(record.step, metrics.fields())
        self._tell_slow(record.ranks)

    def skipped(self, step: int, line: str, cause: str) -> None:
        """A step whose update is not made."""
        self.warn(line)
        self.record(step=step, skipped=cause or "not known")

    def evaluation(self, step: int, loss: float, by_position: Sequence[float | None] = ()) -> None:
        """The held-out loss after `step` steps, and by position: 0, 1, 2 to 3, 4 to 7, ... in powers of two. None: no target."""
        if self.speaks:
            self._first_held_out = loss if self._first_held_out is None else self._first_held_out
            self._held_out = loss
            more = {"held_out_loss_by_position": list(by_position)} if by_position else {}
            self._write({"step": step, "held_out_loss": loss, **more})
            self._say(f"step {step}/{self.job.config.train.steps}  held-out loss {loss:.4f}")

    def draw(self, timeline: Timeline, program: Program, step: int, documents: Lengths = ()) -> None:
        """The timeline of a step: as data, as a picture, as a page beside its replay, and for Perfetto.

        `documents`: of the step's rows.
        """
        if not self.speaks:
            return
        config, folder = self.job.config, self.job.folder
        schedule = config.schedule
        title = (
            f"{schedule.family}, {schedule.ranks} ranks, {schedule.microbatches} micro-batches: step {step}, measured"
        )
        predicted = replayed(program.schedule, timeline, config.setting(self.device), documents)
        stages = tuple(map(str, program.schedule.stages))
        facts = [("predicted", "from this step's own action times, messages free"), ("device", self.device)]
        both = {"predicted": predicted, "measured": timeline}
        try:
            write_text(folder / "timeline.json", to_json(timeline))
            write_text(folder / "timeline.svg", render(timeline, title))
            write_text(folder / "timeline.html", page(both, title, facts, stages=stages))
            write_text(folder / "timeline.perfetto.json", perfetto(both, stages))
        except HelixpipeError as error:  # no picture is worth a run
            self.warn(f"{error}; training goes on")

    @property
    def was_stopped(self) -> bool:
        return bool(self._end)

    def stopped(self, step: int, asked: str) -> None:
        """The run ends after a step because a signal asked it to."""
        folder = shortened(self.job.folder)
        goes_on = f"step {step} is in its checkpoint, and --resume {folder} goes on from there"
        if not self.job.config.run.saves:
            goes_on = f"no checkpoint was written after step {step}, since run.checkpoint_every is 0"
        self._end = f"helixpipe: stopped by {asked}: {goes_on}"

    def warn(self, line: str) -> None:
        """Something that goes wrong, and the run goes on."""
        if self.speaks:
            self._say(f"helixpipe: {line}")

    def record(self, **fields: Any) -> None:
        """A line to compute with."""
        if self.speaks:
            self._write(fields)

    def flush(self) -> None:
        """Put the metrics on the disk for good: a checkpoint must not know steps that they do not. Raises OSError. For any thread."""
        if self.speaks:
            self._metrics.flush()

    def _open_folder(self) -> None:
        folder = self.job.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HelixpipeError(
                f"run.folder: '{folder}' cannot be made: {(error.strerror or str(error)).lower()}"
            ) from None
        self._left = manifests.leave_later(self.job.checkpoints, self.job.step)
        write_text(folder / "config.toml", write_toml(self.job.config))
        known = _metrics_until(self._metrics.path, self.job.step) if self.job.step else ()  # from the start: nothing is
        write_text(self._metrics.path, "".join(known))

    def _head(self) -> None:
        job, train = self.job, self.job.config.train
        self._say(described(job.config, self.device))
        source = f"from {job.checkpoint}, step {job.step}" if job.checkpoint else "from the start"
        self._say(f"run folder {shortened(job.folder)}, {source}")
        if self._left:
            names = ", ".join(path.name for path in self._left)
            self._say(f"later checkpoints are set aside until the next one removes them: {names}")
        self._screen = Screen(train.steps, job.step)

    def _summary(self) -> None:
        train = self.job.config.train
        before = f", from {self._first_held_out:.4f}" if self._first_held_out != self._held_out else ""
        held_out = "" if self._held_out is None else f"held-out loss {self._held_out:.4f} nats a token{before}; "
        minutes, seconds = divmod(round(time.monotonic() - self._begun), 60)
        print(
            f"trained to step {train.steps} in {minutes}:{seconds:02d}; {held_out}run folder {shortened(self.job.folder)}",
            flush=True,
        )

    def _tell_slow(self, ranks: Ranks) -> None:
        """A line for a rank that has become slow, once until it is as fast as before."""
        rank = ranks.slowest if ranks.slowest_ratio >= SLOW else None
        if rank is not None and rank != self._slow:
            self.remark(
                f"{ranks.slowest_name}'s actions took {ranks.slowest_ratio:.1f} times their own median over the last {WINDOW} steps"
            )
        self._slow = rank

    def _write(self, numbers: dict[str, Any]) -> None:
        before, self._metrics_fault = self._metrics_fault, self._metrics.add(numbers)
        if self._metrics_fault and not before:
            self.warn(
                f"{self._metrics.path}: cannot be written: {self._metrics_fault}; training goes on, and its lines wait until it can be"
            )
        self._sinks.write(numbers["step"], scalars(numbers))
        self._tell_all(self._sinks.news())

    def _tell_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.remark(line)

    def _say(self, line: str) -> None:
        if self._screen is not None:
            self._screen.say(line)
        else:
            print(line, file=sys.stderr, flush=True)


def _parameters(shape: ModelShape) -> str:
    """How many, and of how many the run trains some."""
    sizes = shape.parameter_elements(shape.chain())
    trained = sum(size for name, size in sizes.items() if shape.trains(name))
    total = sum(sizes.values())
    return f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")


def described(config: Config, device: str) -> str:
    """A line on what runs where."""
    schedule, train, shape, mesh = config.schedule, config.train, config.shape(), config.mesh_shape()
    asked = "" if train.objective == "next_token" else f", objective {train.objective}"
    ranks = f"{mesh.size} ranks" + (f" ({mesh})" if mesh.size > mesh.pp else "")
    return (
        f"{config.model_title}: {_parameters(shape)}, {shape.layers} layers; "
        f"{schedule.family} on {ranks} ({device.split(':')[0]}), {schedule.microbatches} micro-batches "
        f"of {train.microbatch_size} x {train.sequence_length} tokens{asked}"
    )


def _metrics_until(path: Path, step: int) -> list[str]:
    """The lines of the steps that a checkpoint has done: what came after will come again."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # cut short by the crash
    return kept


def shortened(path: Path) -> str:
    """The path as seen from here, when it is below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
