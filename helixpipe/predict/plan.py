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
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.parts.work import Lengths
from helixpipe.predict.beside import beside, bounded, built_like, leanest
from helixpipe.predict.bounds import Bound
from helixpipe.predict.candidates import Candidate, candidates, slices, spread
from helixpipe.predict.choices import Choice, Of, Priced, Work, no_pipelines, price
from helixpipe.predict.estimate import Setting, check_actions
from helixpipe.predict.steps import typical
from helixpipe.schedule import families

NO_BOUND = Bound(0.0, 0.0)
PRICED_AT_ONCE, BESIDE_AT_ONCE = 16, 4
"""Candidates, in the order of their bounds, before it is asked again which could be among the fastest; and of those that take long."""
Run = Callable[[list[Work]], Iterable[Priced]]
"""Prices, in other processes or here."""
Progress = Callable[[int, int], None]
"""Called with how many schedules are priced, and of how many."""
MOST_ON_STEPS = 16
"""The fastest so many are priced on steps of real documents."""


@dataclass(frozen=True)
class Plan:
    """Everything that was priced: what fits, fastest first, and what does not, nearest first."""

    fits: tuple[Choice, ...]
    misses: tuple[Choice, ...]
    memory_bytes: float
    refused: Mapping[str, str] = field(default_factory=dict)
    """Candidates that cannot be, and why."""
    slower: int = 0
    """Where the fastest alone were asked for: candidates that are slower or do not fit, which a bound says of most."""
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
    progress: Progress = lambda done, of: None,
    steps: Sequence[Lengths] = (),
    top: int | None = None,
) -> Plan:
    """Price every candidate. `setting.keeping` gives the precision; recompute and chunks are the candidates' own.

    `only`: families to consider. `steps`: of each step that the best are ranked by, the documents of its rows. `top`: the
    fits have the fastest so many pipelines alone, and what a bound says is slower is not priced; of steps of documents all
    are. Raises ConfigError, before it searches, for what no candidate can have.
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
    of_step = Of(setting, ranks, microbatches, (typical(setting, steps) * (microbatches * setting.data_parallel),))
    top = None if any(steps) or shape.opaque else top
    with _runner(processes) as run:
        if top is None:
            found = _ranked(of_step, asked, memory_bytes, run, progress, no_pipelines(of_step))
        else:
            found = _fastest(of_step, asked, memory_bytes, run, progress, top)
        if not any(choice.is_pipeline for choice in found.fits) and ranks > 1 and not shape.opaque:
            lean = leanest(setting, ranks, microbatches, asked, memory_bytes)
            found = _joined(found, _ranked(of_step, lean, memory_bytes, run, progress))
        more = _beside(of_step, asked, found, only, bool(any(steps)))
        if top is None and more:
            found = _joined(found, _ranked(of_step, [each for _, each in more], memory_bytes, run, progress))
        tried = len(asked) + len(more)
        more = sorted(more, key=lambda each: each[0].step_s) if top is not None else []
        while more:  # those that could be the fastest
            more = [each for each in more if each[0].step_s <= _limit_s(found, 1)]
            some, more = [each for _, each in more[:BESIDE_AT_ONCE]], more[BESIDE_AT_ONCE:]
            found = _joined(found, _ranked(of_step, some, memory_bytes, run, progress, limit_s=_limit_s(found, 1)))
        if not any(steps):
            return found if top is None else _first(found, top, tried)
        pipelines = [choice for choice in found.fits if choice.is_pipeline]
        again = dict.fromkeys(choice.candidate for choice in (*pipelines[:MOST_ON_STEPS], *found.front))
        on_steps = of_step._replace(steps=tuple(steps))
        ranked = _ranked(on_steps, list(again), memory_bytes, run, progress, no_pipelines(on_steps))
    misses = [*ranked.misses, *(choice for choice in found.misses if choice.is_pipeline)]
    return replace(
        ranked,
        misses=tuple(sorted(misses, key=lambda choice: choice.peak_bytes)),
        refused={**found.refused, **ranked.refused},
        unpriced=len(pipelines) - len(again),
    )


def _first(found: Plan, top: int, tried: int) -> Plan:
    """With the fastest so many pipelines alone, of so many candidates."""
    pipelines = [choice for choice in found.fits if choice.is_pipeline]
    slower = set(map(id, pipelines[top:]))
    fits = tuple(choice for choice in found.fits if id(choice) not in slower)
    return replace(found, fits=fits, slower=tried - len(pipelines[:top]) - len(found.refused))


def _fastest(of: Of, asked: Sequence[Candidate], memory_bytes: float, run: Run, progress: Progress, top: int) -> Plan:
    """The fastest so many of these, and what is no pipeline: in the order of their bounds, until none can be among them.

    Where none fits, the one that needs least is among the misses.
    """
    found = _ranked(of, [], memory_bytes, run, progress, no_pipelines(of))
    by_schedule: dict[tuple[Any, ...], list[tuple[Bound, Candidate]]] = {}
    too_large: list[tuple[Bound, Candidate]] = []
    for candidate, bound in bounded(of.setting, of.ranks, of.microbatches, asked):
        each = bound or NO_BOUND, candidate
        if each[0].peak_bytes > memory_bytes:
            too_large.append(each)
        else:
            by_schedule.setdefault(candidate[:3], []).append(each)
    left = sorted(by_schedule.values(), key=lambda group: -min(bound.step_s for bound, _ in group))
    while left:
        limit_s, some = _limit_s(found, top), []  # type: float, list[Candidate]
        while left and len(some) < PRICED_AT_ONCE:
            some += [candidate for bound, candidate in left.pop() if bound.step_s <= limit_s]
        found = _joined(found, _ranked(of, some, memory_bytes, run, progress, limit_s=limit_s))
    too_large.sort(key=lambda each: -each[0].peak_bytes)
    while too_large and not any(choice.is_pipeline for choice in found.fits):
        nearest = next((choice.peak_bytes for choice in found.misses if choice.is_pipeline), math.inf)
        if too_large[-1][0].peak_bytes > nearest:
            break
        some = [too_large.pop()[1] for _ in range(min(len(too_large), PRICED_AT_ONCE))]
        found = _joined(found, _ranked(of, some, memory_bytes, run, progress))
    place = {candidate: i for i, candidate in enumerate(asked)}  # of equals the first one that is asked for comes first
    fits = sorted(found.fits, key=lambda c: (c.makespan_s, c.peak_bytes, place.get(c.candidate, len(place))))
    return replace(found, fits=tuple(fits))


def _limit_s(found: Plan, top: int | None) -> float:
    """What is slower is not among the fastest so many."""
    times = [choice.makespan_s for choice in found.fits if choice.is_pipeline]
    return times[top - 1] if top is not None and len(times) >= top else math.inf


def _beside(
    of: Of, asked: Sequence[Candidate], found: Plan, only: Sequence[str], documents: bool
) -> list[tuple[Bound, Candidate]]:
    """What else could be the fastest. Bounds are of sequences of one document: of others it is tried where the rest is fastest."""
    pipelines = [choice for choice in found.fits if choice.is_pipeline]
    if of.ranks == 1 or of.setting.shape.opaque or not pipelines:
        return []
    fastest = pipelines[0]
    if documents:
        more = [(NO_BOUND, spread(choice.candidate)) for choice in pipelines[:MOST_ON_STEPS]]
    else:
        more = beside(of.setting, of.ranks, of.microbatches, asked, fastest.makespan_s, found.memory_bytes)
    rank = fastest.ranks[fastest.fullest]
    room_bytes = min(found.memory_bytes, 2 * rank.peak_bytes) - (rank.peak_bytes - rank.peak_activation_bytes)
    built = built_like(fastest.candidate, of.microbatches, of.ranks, room_bytes, only)
    return [*more, *((NO_BOUND, each) for each in built if each not in {known for _, known in more})]


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


def _ranked(
    of: Of,
    asked: Sequence[Candidate],
    memory_bytes: float,
    run: Run,
    progress: Progress,
    others: Sequence[Choice] = (),
    limit_s: float = math.inf,
) -> Plan:
    """These candidates priced, but those that are slower than a limit in their order; and other choices among them."""
    # one schedule at a time, with all its policies: the program is shared
    by_schedule: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in asked:
        by_schedule.setdefault(candidate[:3], []).append(candidate)
    choices = list(others)
    refused: dict[str, str] = {}
    for done, (good, bad) in enumerate(run([(of, group, limit_s) for group in by_schedule.values()]), start=1):
        choices += good
        refused |= bad
        progress(done, len(by_schedule))
    fits = sorted((c for c in choices if c.peak_bytes <= memory_bytes), key=lambda c: (c.makespan_s, c.peak_bytes))
    misses = sorted((c for c in choices if c.peak_bytes > memory_bytes), key=lambda c: c.peak_bytes)
    return Plan(tuple(fits), tuple(misses), memory_bytes, refused)


@contextmanager
def _runner(processes: int) -> Iterator[Run]:
    if processes == 1:
        yield lambda work: map(price, work)
        return
    # no fork: the caller may have threads
    # and no collector: what is made are trees of tuples, which it walks again and again to find nothing
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=gc.disable) as pool:
        yield lambda work: pool.map(price, work)
