"""Choices: candidates priced, of one schedule together, and what is no pipeline beside them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError
from helixpipe.parts.work import Lengths, microbatches
from helixpipe.predict.alternatives import alternatives
from helixpipe.predict.bounds import ROUNDING, makespan_of_order
from helixpipe.predict.building import decided_by
from helixpipe.predict.candidates import RECOMPUTE, Candidate, chunk_sizes, setting_of, slices
from helixpipe.predict.cost import action_seconds
from helixpipe.predict.estimate import Estimate, Setting, check_actions
from helixpipe.predict.reduction import reduction_s
from helixpipe.predict.steps import Batches, RankFigures, figures, mean, order_of_steps, price_step
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule


@dataclass
class Made:
    """Schedules and programs that candidates share."""

    schedules: dict[Any, Schedule] = field(default_factory=dict)
    programs: dict[Any, Program] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A candidate priced; of several steps times are means, and bytes the most of all.

    An alternative that is no pipeline has no options, and all its ranks alike.
    """

    candidate: Candidate
    makespan_s: float
    ideal_s: float
    bubble_ratio: float
    ranks: tuple[RankFigures, ...]
    is_pipeline: bool = True

    @property
    def peak_bytes(self) -> int:
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def fullest(self) -> int:
        """The rank with the most bytes."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].peak_bytes)

    def __str__(self) -> str:
        return str(self.candidate)


class Of(NamedTuple):
    """What candidates are priced for; `steps`: of each the documents of its rows."""

    setting: Setting
    ranks: int
    microbatches: int
    steps: tuple[Lengths, ...]


Work = tuple[Of, Sequence[Candidate], float]
"""What candidates of one schedule are priced for; and seconds, beyond which nobody asks what one takes."""
Priced = tuple[list[Choice], dict[str, str]]
"""Those that can be, and why others cannot."""


def price(work: Work) -> Priced:
    """All candidates of one schedule but those that are slower in its order. Those that it, or the sequence, refuses are told why.

    Chunks that no segment is longer than change nothing: such a candidate is another one.
    """
    of, group, limit_s = work
    good, bad = [], {}
    made = Made()
    for candidate in group:
        try:
            check_actions(_actions(candidate, of.ranks, of.setting.shape.layers, of.microbatches))
            is_another = bool(candidate.chunk) and candidate.chunk >= _longest(of.setting, candidate)
            if not is_another and (math.isinf(limit_s) or _least_s(of, candidate, made) <= limit_s):
                good.append(_choice(of, candidate, made))
        except ConfigError as error:
            bad[str(candidate)] = str(error)
    return good, bad


def _actions(candidate: Candidate, ranks: int, layers: int, microbatches: int) -> int:
    """The most that its schedule can have."""
    given = dict(candidate.options)
    stages = 2 * layers + 1 if candidate.family == "helix" else 2 * ranks * given.get("stages_per_rank", 1)
    return int(3 * microbatches * given.get("segments", 1) * stages)


def _longest(setting: Setting, candidate: Candidate) -> int:
    """Tokens of a candidate's longest segment."""
    return max(setting_of(setting, candidate).segment_lengths(dict(candidate.options).get("segments", 1)))


def _least_s(of: Of, candidate: Candidate, made: Made) -> float:
    """What a step takes at least: with messages that take no time."""
    setting = setting_of(of.setting, candidate)
    schedule, _ = _schedule(setting, of.ranks, of.microbatches, candidate, made)
    batch = setting.batch(schedule.segments)
    seconds = action_seconds(schedule, setting.shape, batch, setting.costs, setting.keeping)
    return makespan_of_order(schedule, seconds) + reduction_s(schedule, setting) * ROUNDING


def _choice(of: Of, candidate: Candidate, made: Made) -> Choice:
    steps = [estimate_step(of.setting, of.ranks, of.microbatches, candidate, made, step) for step in of.steps]
    return Choice(candidate, *mean([figures(replicas) for replicas in steps]))


def _schedule(
    setting: Setting, ranks: int, microbatches: int, candidate: Candidate, made: Made
) -> tuple[Schedule, tuple[Any, ...]]:
    """And what decided it, by which others share it."""
    options = dict(candidate.options)
    decided = decided_by(setting, candidate.family, options)
    if decided not in made.schedules:
        made.schedules[decided] = setting.build(candidate.family, ranks, microbatches, **options)
    return made.schedules[decided], decided


def estimate_candidate(
    setting: Setting, ranks: int, microbatches: int, candidate: Candidate, made: Made | None = None
) -> Estimate:
    """The whole estimate behind a choice. `made` keeps what candidates of one schedule share."""
    return estimate_step(setting, ranks, microbatches, candidate, made)[0]


def estimate_step(
    setting: Setting, ranks: int, microbatches: int, candidate: Candidate, made: Made | None = None, step: Lengths = ()
) -> tuple[Estimate, ...]:
    """The same of a step of documents, for each replica, or a single one where all are alike."""
    setting = setting_of(setting, candidate)
    shared = Made() if made is None else made
    schedule, decided = _schedule(setting, ranks, microbatches, candidate, shared)
    order = order_of_steps(setting, schedule, candidate.family, dict(candidate.options))

    def program(batches: Batches) -> Program:
        if (decided, batches) not in shared.programs:
            ordered = schedule if order is None else order(batches)
            shared.programs[decided, batches] = lower(ordered, setting.shape, batches)
        return shared.programs[decided, batches]

    return price_step(schedule, setting, step, program)


def no_pipelines(of: Of) -> list[Choice]:
    """What is no pipeline, under every policy, on as many accelerators for as many sequences."""
    setting, ranks, found = of.setting, of.ranks, []
    count, uncut = of.microbatches * setting.data_parallel, (setting.sequence_length,)
    steps = [microbatches(setting.whole, count, documents, lambda rows: uncut) for documents in of.steps]
    seconds = cache(setting.batch_s)
    ideal_s = statistics.mean(seconds(batch) for step in steps for batch in step) * of.microbatches / ranks
    alone = replace(setting, context_parallel=1, data_parallel=1)
    replicas = ranks * setting.context_parallel * setting.data_parallel
    chunks = chunk_sizes(setting.sequence_length) if slices(setting.shape) else (0,)
    for recompute, chunk in itertools.product(RECOMPUTE, chunks):
        keeping = replace(setting.keeping, recompute=recompute, mlp_chunk=chunk, head_chunk=chunk)
        of_steps = [alternatives(replace(alone, keeping=keeping), replicas, step) for step in steps]
        for each in zip(*of_steps, strict=True):
            makespan_s = statistics.mean(one.makespan_s for one in each)
            busy_s = statistics.mean(one.busy_s for one in each)
            idle = makespan_s - busy_s
            one = each[0]  # bytes are the same whatever documents are, where sequences are whole
            alike = (RankFigures(busy_s, idle, one.peak_activation_bytes, one.peak_bytes),) * ranks
            candidate = Candidate(one.name, (), 0.0, recompute, chunk)
            found.append(Choice(candidate, makespan_s, ideal_s, idle / makespan_s, alike, False))
    return found
