"""Plan: every family, its options, and what a forward keeps, priced; those that fit in memory, fastest first.

    candidates   family x options (v, k, evenness, folds, travel, groups) x recompute x chunks
    choices      each with the step time and every rank's bytes: an estimate is never a mean of ranks
    front        the choices that no other beats in both time and memory

Programs are lowered once a schedule and shared by all policies and chunk sizes; estimates are spread over processes.

Steps of real documents differ, and pricing several for each of hundreds of candidates would take minutes. So all candidates are
priced as if every micro-batch were the one of mean work, and the best of those that fit, and the front, once more on the steps.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError
from helixpipe.parts.work import Lengths, microbatches
from helixpipe.predict.alternatives import alternatives
from helixpipe.predict.beside import beside, built_like, leanest
from helixpipe.predict.building import decided_by
from helixpipe.predict.candidates import RECOMPUTE, Candidate, candidates, chunk_sizes, setting_of, slices, spread
from helixpipe.predict.estimate import Estimate, Setting, check_actions
from helixpipe.predict.steps import Batches, RankFigures, figures, mean, order_of_steps, price_step, typical
from helixpipe.schedule import families
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule

MOST_ON_STEPS = 16
"""The fastest so many are priced on steps of real documents."""


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


@dataclass(frozen=True)
class Plan:
    """Everything that was priced: what fits, fastest first, and what does not, nearest first."""

    fits: tuple[Choice, ...]
    misses: tuple[Choice, ...]
    memory_bytes: float
    refused: Mapping[str, str] = field(default_factory=dict)
    """Candidates that cannot be, and why."""
    unpriced: int = 0
    """Of steps of documents: choices that fit where all micro-batches are the one of mean work, not priced on the steps."""

    @property
    def best(self) -> Choice:
        """The fastest pipeline that fits; raises ConfigError when none does, with the nearest miss."""
        for choice in self.fits:
            if choice.is_pipeline:
                return choice
        raise ConfigError(self.nothing)

    @property
    def is_answer(self) -> bool:
        """Whether something fits; what fits may be no pipeline, where one could be made."""
        return bool(self.fits) and any(choice.is_pipeline for choice in (*self.fits, *self.misses))

    @property
    def front(self) -> tuple[Choice, ...]:
        """Pipelines that no other beats in both time and memory, fastest first."""
        found: list[Choice] = []
        for choice in self.fits:
            if choice.is_pipeline and (not found or choice.peak_bytes < found[-1].peak_bytes):
                found.append(choice)
        return tuple(found)

    @property
    def nothing(self) -> str:
        """Why no pipeline fits."""
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        nearest = next((choice for choice in self.misses if choice.is_pipeline), None)
        if nearest is None:
            reason = next(iter(self.refused.values()), "there are no candidates")
            return f"no schedule can be made for this: {reason}"
        return (
            f"memory: no schedule fits {memory}; the nearest is {nearest} with {nearest.peak_bytes / 2**30:.1f} GiB "
            f"on rank {nearest.fullest}: give that much memory, more ranks, or more tensor_parallel"
        )


def plan(
    setting: Setting,
    ranks: int,
    microbatches: int,
    memory_bytes: float,
    only: Sequence[str] = (),
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
    steps: Sequence[Lengths] = (),
) -> Plan:
    """Price every candidate. `setting.keeping` gives the precision; recompute and chunks are the candidates' own.

    `only`: families to consider. `steps`: of each step that the best are ranked by, the documents of its rows. Raises
    ConfigError, before it searches, for what no candidate can have.
    """
    for name in only:
        families.options(name)
    if ranks < 1 or microbatches < 1:
        raise ConfigError(f"ranks, microbatches: {ranks}, {microbatches}; give at least 1 of each")
    shape = setting.shape
    check_actions(2 * max(ranks, ranks * microbatches))
    shape.check_length(setting.sequence_length)
    _ = setting.costs  # what no candidate can be priced by is refused before the search
    asked = candidates(ranks, shape.layers, setting.sequence_length, setting.segment_multiple, shape.causal, only)
    if not slices(shape):
        asked = [candidate for candidate in asked if not candidate.chunk]
    of_step = _Of(setting, ranks, microbatches, (typical(setting, steps) * (microbatches * setting.data_parallel),))
    found = _ranked(of_step, asked, memory_bytes, processes, progress)
    if not any(choice.is_pipeline for choice in found.fits) and ranks > 1 and not shape.opaque:
        lean = leanest(setting, ranks, microbatches, asked, memory_bytes)
        found = _joined(found, _ranked(of_step, lean, memory_bytes, processes, progress))
    if more := _beside(of_step, asked, found, only, bool(any(steps))):
        found = _joined(found, _ranked(of_step, more, memory_bytes, processes, progress))
    if not any(steps):
        return found
    pipelines = [choice for choice in found.fits if choice.is_pipeline]
    again = dict.fromkeys(choice.candidate for choice in (*pipelines[:MOST_ON_STEPS], *found.front))
    on_steps = _ranked(of_step._replace(steps=tuple(steps)), list(again), memory_bytes, processes, progress)
    misses = [*on_steps.misses, *(choice for choice in found.misses if choice.is_pipeline)]
    return replace(
        on_steps,
        misses=tuple(sorted(misses, key=lambda choice: choice.peak_bytes)),
        refused={**found.refused, **on_steps.refused},
        unpriced=len(pipelines) - len(again),
    )


def _beside(of: _Of, asked: Sequence[Candidate], found: Plan, only: Sequence[str], documents: bool) -> list[Candidate]:
    """What else could be the fastest. Bounds are of sequences of one document: of others it is tried where the rest is fastest."""
    pipelines = [choice for choice in found.fits if choice.is_pipeline]
    if of.ranks == 1 or of.setting.shape.opaque or not pipelines:
        return []
    fastest = pipelines[0]
    if documents:
        more = [spread(choice.candidate) for choice in pipelines[:MOST_ON_STEPS]]
    else:
        more = beside(of.setting, of.ranks, of.microbatches, asked, fastest.makespan_s, found.memory_bytes)
    rank = fastest.ranks[fastest.fullest]
    room_bytes = min(found.memory_bytes, 2 * rank.peak_bytes) - (rank.peak_bytes - rank.peak_activation_bytes)
    more += built_like(fastest.candidate, of.microbatches, of.ranks, room_bytes, only)
    return list(dict.fromkeys(more))


def _joined(first: Plan, second: Plan) -> Plan:
    """Both plans' choices in one order, each candidate and alternative once."""
    known = {choice.candidate for choice in (*first.fits, *first.misses)}
    fits = [*first.fits, *(choice for choice in second.fits if choice.candidate not in known)]
    misses = [*first.misses, *(choice for choice in second.misses if choice.candidate not in known)]
    return replace(
        first,
        fits=tuple(sorted(fits, key=lambda c: (c.makespan_s, c.peak_bytes))),
        misses=tuple(sorted(misses, key=lambda c: c.peak_bytes)),
        refused={**first.refused, **second.refused},
    )


class _Of(NamedTuple):
    """What candidates are priced for; `steps`: of each the documents of its rows."""

    setting: Setting
    ranks: int
    microbatches: int
    steps: tuple[Lengths, ...]


def _ranked(
    of: _Of, asked: Sequence[Candidate], memory_bytes: float, processes: int, progress: Callable[[int, int], None]
) -> Plan:
    """These candidates and the alternatives, priced."""
    # one schedule at a time, with all its policies: the program is shared
    by_schedule: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in asked:
        by_schedule.setdefault((candidate.family, candidate.options, candidate.evenness), []).append(candidate)
    work = [(of, group) for group in by_schedule.values()]
    choices: list[Choice] = []
    refused: dict[str, str] = {}
    for done, (good, bad) in enumerate(_spread(work, processes), start=1):
        choices += good
        refused |= bad
        progress(done, len(work))
    choices += _alternatives(of)
    fits = sorted((c for c in choices if c.peak_bytes <= memory_bytes), key=lambda c: (c.makespan_s, c.peak_bytes))
    misses = sorted((c for c in choices if c.peak_bytes > memory_bytes), key=lambda c: c.peak_bytes)
    return Plan(tuple(fits), tuple(misses), memory_bytes, refused)


_Work = tuple[_Of, list[Candidate]]


def _spread(work: list[_Work], processes: int) -> Iterator[tuple[list[Choice], dict[str, str]]]:
    if processes == 1:
        yield from map(_price, work)
        return
    # no fork: the caller may have threads
    # and no collector: what is made are trees of tuples, which it walks again and again to find nothing
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=gc.disable) as pool:
        yield from pool.map(_price, work)


def _price(work: _Work) -> tuple[list[Choice], dict[str, str]]:
    """All candidates of one schedule. Those that it, or the sequence, refuses are told why.

    Chunks that no segment is longer than change nothing: such a candidate is another one.
    """
    of, group = work
    good, bad = [], {}
    made = Made()
    for candidate in group:
        try:
            check_actions(_actions(candidate, of.ranks, of.setting.shape.layers, of.microbatches))
            if not candidate.chunk or candidate.chunk < _longest(of.setting, candidate):
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


def _choice(of: _Of, candidate: Candidate, made: Made) -> Choice:
    steps = [estimate_step(of.setting, of.ranks, of.microbatches, candidate, made, step) for step in of.steps]
    return Choice(candidate, *mean([figures(replicas) for replicas in steps]))


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
    options = dict(candidate.options)
    shared = Made() if made is None else made
    decided = decided_by(setting, candidate.family, options)
    if decided not in shared.schedules:
        shared.schedules[decided] = setting.build(candidate.family, ranks, microbatches, **options)
    schedule = shared.schedules[decided]
    order = order_of_steps(setting, schedule, candidate.family, options)

    def program(batches: Batches) -> Program:
        if (decided, batches) not in shared.programs:
            ordered = schedule if order is None else order(batches)
            shared.programs[decided, batches] = lower(ordered, setting.shape, batches)
        return shared.programs[decided, batches]

    return price_step(schedule, setting, step, program)


def _alternatives(of: _Of) -> list[Choice]:
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
