"""Refining: a layout and a schedule built, bounded by its own order, and simulated where it could still be the answer.

A process keeps the last schedules and programs that it made: layouts that differ in nothing but dp, cp and tp share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.parts.work import Batch
from helixpipe.predict.bounds import Bound, PolicyBound, makespan_of_order, peak_of_order
from helixpipe.predict.building import decided_by
from helixpipe.predict.candidates import CONSTRUCTED, Candidate, setting_of
from helixpipe.predict.cost import action_seconds
from helixpipe.predict.estimate import Estimate, Setting, priced
from helixpipe.predict.layouts import Asked, Layout
from helixpipe.predict.placement import Placement
from helixpipe.predict.steps import Figures, figures
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule


class Row(NamedTuple):
    """A layout and a schedule, simulated."""

    layout: Layout
    candidate: Candidate
    figures: Figures

    @property
    def step_s(self) -> float:
        return self.figures.step_s

    @property
    def peak_bytes(self) -> int:
        return self.figures.peak_bytes

    @property
    def schedule_told(self) -> str:
        """The schedule in words; one rank is no pipeline."""
        if self.layout.mesh.pp > 1:
            return str(self.candidate)
        told = [f"{name} {value}" for name, value in self.candidate.options]
        told += [f"evenness {self.candidate.evenness:g}"] if self.candidate.evenness else []
        return ", ".join(["no pipeline", *told, self.candidate.kept])


class Task(NamedTuple):
    """What a worker refines."""

    asked: Asked
    layout: Layout
    candidate: Candidate
    limit_s: float


class Result(NamedTuple):
    """`row`, or why there is none: a bound on time or bytes, or what was refused."""

    row: Row | None = None
    bound: Bound | None = None
    refused: str = ""


_placements: dict[Any, Placement] = {}


def placed(setting: Setting, layout: Layout, candidate: Candidate, ranks: int = 0) -> Placement:
    """The stages of a candidate, from the smallest schedule that its family makes; refused as the whole one would be."""
    options = {name: 1 if name == "segments" else value for name, value in candidate.options}
    ranks, m = ranks or layout.mesh.pp, layout.microbatches
    decided = decided_by(setting, candidate.family, options)
    key = (setting.shape, candidate.family, tuple(options.items()), ranks, m >= 2 * ranks, decided)
    if key not in _placements:
        try:  # two micro-batches show whether each has ranks of its own
            schedule = setting.build(candidate.family, ranks, min(m, 2), **options)
        except ConfigError:
            schedule = setting.build(candidate.family, ranks, min(m, 2 * ranks), **options)
        made = Placement(
            schedule, setting.shape, candidate.family == CONSTRUCTED
        )  # which decides it by what is shorter
        # families with the same stages on the same ranks are one
        same = (setting.shape, schedule.stages, schedule.ranks_of, made.splits)
        _placements[key] = _placements.setdefault(same, made)
    return _placements[key]


def refine(task: Task) -> Result:
    """Build, bound again, and simulate what could still be the answer."""
    asked, layout, candidate, limit_s = task
    setting = setting_of(layout.setting(asked), candidate)
    try:
        batch = setting.batch(dict(candidate.options).get("segments", 1))
        schedule = _schedule(setting, layout, candidate)
    except (ConfigError, ScheduleError) as error:
        return Result(refused=str(error))
    policy = PolicyBound(setting, layout.mesh.pp, layout.microbatches)
    small = placed(setting, layout, candidate)
    least_bytes = peak_of_order(schedule, small.standing(setting), batch, policy.kept_of_stages(small))
    if least_bytes > asked.memory_bytes:
        return Result(bound=Bound(0.0, least_bytes))
    seconds = action_seconds(schedule, setting.shape, batch, setting.costs, setting.keeping)
    least_s = makespan_of_order(schedule, seconds) + small.reduction_s(setting)
    if least_s > limit_s:
        return Result(bound=Bound(least_s, least_bytes))
    estimate = priced(_program(schedule, setting, batch), setting)
    return Result(Row(layout, candidate, figures([estimate])))


def estimate_row(asked: Asked, row: Row) -> Estimate:
    """The whole estimate behind a row."""
    setting = setting_of(row.layout.setting(asked), row.candidate)
    options = dict(row.candidate.options)
    schedule = setting.build(row.candidate.family, row.layout.mesh.pp, row.layout.microbatches, **options)
    return priced(lower(schedule, setting.shape, setting.batch(schedule.segments)), setting)


class _Kept:
    """The last few schedules and programs that a worker made: layouts share them."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        found = self.known.pop(key, None)
        self.known[key] = make() if found is None else found
        while len(self.known) > 6:
            del self.known[next(iter(self.known))]
        return self.known[key]


_kept_schedules, _kept_programs = _Kept(), _Kept()


def _schedule(setting: Setting, layout: Layout, candidate: Candidate) -> Schedule:
    decided = decided_by(setting, candidate.family, dict(candidate.options))
    key = (candidate.family, candidate.options, layout.mesh.pp, layout.microbatches, decided, setting.shape)
    schedule: Schedule = _kept_schedules.get(
        key,
        lambda: setting.build(candidate.family, layout.mesh.pp, layout.microbatches, **dict(candidate.options)),
    )
    return schedule


def _program(schedule: Schedule, setting: Setting, batch: Batch) -> Program:
    program: Program = _kept_programs.get((id(schedule), batch), lambda: lower(schedule, setting.shape, batch))
    if program.schedule is not schedule:  # another one had its place in memory
        return lower(schedule, setting.shape, batch)
    return program
