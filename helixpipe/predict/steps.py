"""Steps of documents: what the micro-batches of a step hold, and what steps that differ take.

    documents of each row ──► batches, each cut by its own ──► lower ──► priced      for every replica
                                                                 └ the slowest one ends the step

Which documents a step has, its reading says (`train.reading`); nothing here knows of files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError
from helixpipe.parts.work import Batch, Lengths, microbatches
from helixpipe.predict.estimate import Estimate, Setting, priced
from helixpipe.schedule.cap import NoRoom
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule

Batches = tuple[Batch, ...]


Order = Callable[[Sequence[Batch]], Schedule]


class RankFigures(NamedTuple):
    """What a step asks of one rank."""

    busy_s: float
    idle_s: float
    peak_activation_bytes: int
    peak_bytes: int


class Figures(NamedTuple):
    """What a step takes; of several the means, and the most bytes."""

    step_s: float
    ideal_s: float
    bubble_ratio: float
    ranks: tuple[RankFigures, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(rank.peak_bytes for rank in self.ranks)


def step_batches(setting: Setting, schedule: Schedule, documents: Lengths = ()) -> tuple[Batches, ...]:
    """Of each replica, the batch of each of its micro-batches: the very ones that training lowers.

    Raises ConfigError for documents of another number of rows, or in layers that are not told where they begin.
    """
    rows = schedule.microbatches * setting.microbatch_size
    if documents and len(documents) != rows * setting.data_parallel:
        raise ConfigError(f"documents: of {len(documents)} rows, and a step has {rows * setting.data_parallel}")
    blocks = [str(part) for stage in schedule.stages for part in stage.parts if part.about.opaque]
    if blocks and any(len(row) > 1 for row in documents):
        raise ConfigError(
            f"opaque: {blocks[0]} is one block, which is not told where documents begin; give it one document a sequence"
        )
    whole = setting.batch(schedule.segments)

    def cut(mine: Lengths) -> tuple[int, ...]:
        return setting.batch(schedule.segments, mine).segment_lengths

    starts = range(0, rows * setting.data_parallel, rows)
    return tuple(tuple(microbatches(whole, schedule.microbatches, documents[at : at + rows], cut)) for at in starts)


def order_of_steps(setting: Setting, schedule: Schedule, family: str, options: Mapping[str, Any]) -> Order | None:
    """A step's micro-batches -> the schedule that they run, where it follows from what they cost; None where it is always this one.

        helix, balance "work"    which micro-batches are a group
        constructed              the order of all actions

    `schedule`: the setting's, of this family with these options; stages stay as they are there. It follows from the micro-batches
    alone, so every rank has the same, and whoever asks later.
    """
    is_constructed = family == "constructed"
    if not is_constructed and options.get("balance") != "work":
        return None
    usual = setting.batch(schedule.segments)

    def order(batches: Sequence[Batch]) -> Schedule:
        if is_constructed and all(batch == usual for batch in batches):
            return schedule
        own: dict[str, Any] = {"like": schedule} if is_constructed else {"work": setting.attention_costs(batches)}
        given: dict[str, Any] = setting.known(family, options.get("vocabulary", "last"), batches)
        given |= {"model": setting.shape, **options, **own}
        try:
            return build_schedule(family, ranks=len(schedule.ranks), microbatches=schedule.microbatches, **given)
        except NoRoom:  # cut by documents, a window's segments may keep a little more than these do
            return schedule

    return order


def price_step(
    schedule: Schedule,
    setting: Setting,
    documents: Lengths = (),
    program: Callable[[Batches], Program] | None = None,
    order: Order | None = None,
) -> tuple[Estimate, ...]:
    """A checked schedule's estimate for each replica; a single one where all are alike. `program`: lowers, in place of `lower`;
    `order`: see `order_of_steps`.
    """
    replicas = step_batches(setting, schedule, documents)
    lowered = program or (lambda batches: lower(order(batches) if order else schedule, setting.shape, batches))
    found = {batches: priced(lowered(batches), setting) for batches in dict.fromkeys(replicas)}
    return tuple(found[batches] for batches in replicas) if len(found) > 1 else tuple(found.values())


def figures(replicas: Sequence[Estimate]) -> Figures:
    """Of one step: replicas wait for the slowest of them, and each has its own bytes."""
    timelines = [each.timeline for each in replicas]
    makespan_s = max(timeline.makespan_s for timeline in timelines)
    busy = [statistics.mean(each) for each in zip(*(timeline.busy_s for timeline in timelines), strict=True)]
    activations, peaks = (
        [max(each) for each in zip(*found, strict=True)]
        for found in (
            [timeline.peak_activation_bytes for timeline in timelines],
            [timeline.peak_bytes for timeline in timelines],
        )
    )
    idle = [makespan_s - each for each in busy]
    return Figures(
        max(each.step_s for each in replicas),
        statistics.mean(each.ideal_s for each in replicas),
        1 - sum(busy) / (makespan_s * len(busy)) if makespan_s else 0.0,
        tuple(RankFigures(*row) for row in zip(busy, idle, activations, peaks, strict=True)),
    )


def mean(steps: Sequence[Figures]) -> Figures:
    """Of several steps: mean times, and of bytes the most."""
    if len(steps) == 1:
        return steps[0]
    step_s, ideal_s, bubble_ratio = (statistics.mean(each) for each in zip(*(step[:3] for step in steps), strict=True))
    ranks = [
        RankFigures(
            statistics.mean(rank.busy_s for rank in each),
            statistics.mean(rank.idle_s for rank in each),
            max(rank.peak_activation_bytes for rank in each),
            max(rank.peak_bytes for rank in each),
        )
        for each in zip(*(step.ranks for step in steps), strict=True)
    ]
    return Figures(step_s, ideal_s, bubble_ratio, tuple(ranks))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of these lies, between two of them by a line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def nearest_median(values: Sequence[float]) -> int:
    """Which of these is the nearest to their median, the first of several."""
    middle = statistics.median(values)
    return min(range(len(values)), key=lambda at: abs(values[at] - middle))


def typical(setting: Setting, steps: Sequence[Lengths]) -> Lengths:
    """Of all micro-batches of these steps, the documents of the one whose work is the nearest to the mean."""
    size = setting.microbatch_size
    each = [step[first : first + size] for step in steps for first in range(0, len(step), size)]
    if not each:
        return ()
    taken = {rows: setting.batch_s(setting.batch(1, rows)) for rows in dict.fromkeys(each)}
    middle = statistics.mean(taken[rows] for rows in each)
    return min(taken, key=lambda rows: abs(taken[rows] - middle))
