"""Search: the best plan for a number of accelerators, over layouts, families, options and policies.

    bound of (layout, policy) ─► of (layout, policy, schedule) ─► the schedule's own, built ─► simulated
         cheap, for all              for what could still win            in order, the lowest bound first

First a few schedules that are quick to price are, so that there is something to be faster than: bounds know of no messages, and
what sends most has the lowest. Then whatever has the lowest bound is refined; the search ends when no bound is below the times found. What is never simulated is
therefore no faster than what is told, or does not fit: each mesh's best is its best, and so are the best meshes.

With many micro-batches nearly all schedules are nearly ideal, and to tell the last of them apart would take hours. So each time
that `PATIENCE` actions were refined, what could be faster by one percent at most, then by two, and so on, is let go: the answer
says `within`.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.parts.work import Batch
from helixpipe.predict.beside import built_like
from helixpipe.predict.bounds import Bound, PolicyBound
from helixpipe.predict.candidates import (
    CONSTRUCTED,
    RECOMPUTE,
    SPREAD,
    Candidate,
    candidates,
    chunk_sizes,
    setting_of,
    slices,
    spread,
    together,
)
from helixpipe.predict.cost import PartCosts
from helixpipe.predict.estimate import Setting
from helixpipe.predict.layouts import Asked, Layout, commonest, layouts
from helixpipe.predict.placement import Placement
from helixpipe.predict.refine import Result, Row, Task, placed, refine
from helixpipe.predict.sums import Prices
from helixpipe.schedule import families

ALONE = ("1f1b", "seq1f1b")
"""Of one pipeline rank: whole sequences, or segments, each forward followed by its backward. All others keep more."""
UNEVEN = ("slimpipe",)
"""Not tried unless asked for: seq1f1b_interleaved has its order, with segments that cost the same."""
FIRST = ("1f1b", "interleaved")
"""Families that are priced before all others, on so many layouts, of no more than so many actions each."""
FIRST_LAYOUTS, FIRST_ACTIONS = 8, 4096
PATIENCE, LET_GO = 1_000_000, 0.01
"""Actions, and the share of a step's time that is let go after each so many."""
MOST_ACTIONS = 32768
"""A schedule may have more only if it is the one with the fewest of its family: beyond, pieces gain next to nothing."""


@dataclass(frozen=True)
class Answer:
    """The best layouts, one row a mesh, fastest first."""

    rows: tuple[Row, ...]
    layouts: int
    schedules: int
    """All that there are."""
    simulated: int
    refused: str = ""
    """Why most of what was refused cannot be."""
    least_bytes: float = 0.0
    """Where nothing fits: what any needs at least, and which."""
    least: str = ""
    within: float = 0.0
    """No plan of a named family is faster by more than this share of its time."""


Progress = Callable[[int, int], None]
"""Called with how many are simulated, and how many could still be faster."""


def search(
    asked: Asked,
    top: int = 1,
    processes: int = 1,
    progress: Progress = lambda done, left: None,
    patience: int = PATIENCE,
) -> Answer:
    """The `top` best meshes, each with its best schedule. Raises ConfigError where there is no layout at all."""
    for name in asked.families:
        families.options(name)
    if top < 1:
        raise ConfigError(f"top: {top}; give at least 1")
    asked.setting.shape.check_length(asked.setting.sequence_length)
    _ = asked.setting.costs  # what nothing can be priced by is refused before the search
    with _executor(processes) as executor:
        return _Search(asked, top, progress, patience).run(executor, processes)


@dataclass
class _Search:
    asked: Asked
    top: int
    progress: Progress
    patience: int
    best: dict[tuple[int, ...], Row] = field(default_factory=dict)
    queue: list[tuple[float, int, Layout, PolicyBound | Candidate]] = field(default_factory=list)
    simulated: int = 0
    schedules: int = 0
    refined: int = 0
    """Actions of all that was handed out."""
    done: set[tuple[Layout, Candidate]] = field(default_factory=set)
    """What was priced at first."""
    refusals: Counter[str] = field(default_factory=Counter)
    least: tuple[float, str] = (float("inf"), "")
    _order: Iterator[int] = field(default_factory=itertools.count)
    _prices: dict[PartCosts, dict[Batch, Prices]] = field(default_factory=dict)
    _schedules: dict[tuple[int, int, int], list[Candidate]] = field(default_factory=dict)

    def run(self, executor: Executor, processes: int) -> Answer:
        found = layouts(self.asked)
        if not found.layouts:
            raise ConfigError(f"accelerators: no layout of {self.asked.accelerators} can be: {found.why}")
        self.refusals.update(found.refused)
        for layout in found.layouts:
            self._enter(layout)
        for first, future in [(task, executor.submit(refine, task)) for task in self._first()]:
            self._take(first, future.result())
        under_way: dict[Future[Result], Task] = {}
        while self.queue or under_way:
            while self.queue and len(under_way) < processes + (processes > 1):
                task = self._next()
                if task is not None:
                    under_way[executor.submit(refine, task)] = task
            if not under_way:
                continue
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(under_way.pop(future), future.result())
            self.progress(self.simulated, self._left() + len(under_way))
        self._construct(executor)
        rows = sorted(self.best.values(), key=_rank)[: self.top]
        return Answer(
            tuple(rows), len(found.layouts), self.schedules, self.simulated, commonest(self.refusals), *self.least,
            self.within,
        )  # fmt: skip

    def _first(self) -> list[Task]:
        """What is priced before bounds are asked: of the layouts with the lowest, whole sequences of which all is kept."""
        found: list[Task] = []
        known: set[tuple[int, ...]] = set()
        for _, _, layout, policy in sorted(self.queue, key=lambda each: each[:2]):
            if not isinstance(policy, PolicyBound) or layout.key in known or len(known) == FIRST_LAYOUTS:
                continue
            keeping = policy.setting.keeping
            if keeping.recompute != "none" or keeping.mlp_chunk:
                continue
            whole = [
                candidate
                for candidate in self._schedules_of(layout, policy.setting)
                if candidate.family in FIRST
                and SPREAD not in candidate.options
                and _actions(candidate, layout) <= FIRST_ACTIONS
            ]
            if whole:
                known.add(layout.key)
                found.append(Task(self.asked, layout, max(whole, key=_pieces), float("inf")))
        self.done.update((task.layout, task.candidate) for task in found)
        return found

    def _enter(self, layout: Layout) -> None:
        """A layout under each policy, with its bound."""
        try:
            setting = layout.setting(self.asked)
        except ConfigError as error:
            self.refusals[str(error)] += 1
            return
        prices = self._prices.setdefault(setting.costs, {})
        chunks = chunk_sizes(setting.sequence_length, layout.mesh.cp) if slices(setting.shape) else (0,)
        for recompute, chunk in itertools.product(RECOMPUTE, chunks):
            keeping = replace(setting.keeping, recompute=recompute, mlp_chunk=chunk, head_chunk=chunk)
            policy = PolicyBound(replace(setting, keeping=keeping), layout.mesh.pp, layout.microbatches, prices)
            self._push(policy.bound, layout, policy)

    def _push(self, bound: Bound, layout: Layout, item: PolicyBound | Candidate) -> None:
        if bound.peak_bytes <= self.asked.memory_bytes:
            heapq.heappush(self.queue, (bound.step_s, next(self._order), layout, item))
        else:
            self._misses(bound.peak_bytes, layout, item)

    def _misses(self, nbytes: float, layout: Layout, item: PolicyBound | Candidate) -> None:
        """It needs so much at least, which is more than there is."""
        if nbytes <= self.least[0]:
            told = str(layout) if isinstance(item, PolicyBound) else f"{layout}, {item}"
            self.least = min(self.least, (nbytes, told))

    @property
    def within(self) -> float:
        """The share of a step's time by which others may be faster: they are let go."""
        return min(0.5, LET_GO * (self.refined // self.patience))

    def limit_s(self, layout: Layout) -> float:
        """What is slower is neither its mesh's best nor among the best meshes, or is let go."""
        others = sorted(row.step_s for key, row in self.best.items() if key != layout.key)
        mine = self.best[layout.key].step_s if layout.key in self.best else float("inf")
        return min(mine, others[self.top - 1] if len(others) >= self.top else float("inf")) * (1 - self.within)

    def _next(self) -> Task | None:
        """The lowest bound: refined here where it is of a policy, and handed out where it is of a schedule."""
        bound_s, _, layout, item = heapq.heappop(self.queue)
        if bound_s > self._slowest_s:
            self.queue.clear()  # all others are slower still
            return None
        limit_s = self.limit_s(layout)
        if bound_s > limit_s or (layout, item) in self.done:
            return None
        if isinstance(item, PolicyBound):
            self._expand(layout, item)
            return None
        self.refined += _actions(item, layout)
        return Task(self.asked, layout, item, limit_s)

    @property
    def _slowest_s(self) -> float:
        """What is slower is among the best meshes of no layout, or is let go."""
        times = sorted(row.step_s for row in self.best.values())
        return times[self.top - 1] * (1 - self.within) if len(times) >= self.top else float("inf")

    def _expand(self, layout: Layout, policy: PolicyBound) -> None:
        keeping = policy.setting.keeping
        settings: dict[tuple[float, str], Setting] = {}  # most candidates are alike in these, and in their stages
        placements: dict[tuple[Any, ...], Placement | str] = {}
        for candidate in self._schedules_of(layout, policy.setting):
            candidate = candidate._replace(recompute=keeping.recompute, chunk=keeping.mlp_chunk)
            alike = candidate.evenness, families.default_partition(candidate.family)
            if alike not in settings:
                settings[alike] = setting_of(policy.setting, candidate)
            mine = settings[alike]
            key = alike, candidate.family, tuple(option for option in candidate.options if option[0] != "segments")
            try:
                batch = mine.batch(dict(candidate.options).get("segments", 1))
                if key not in placements:
                    placements[key] = _placed(mine, layout, candidate)
            except ConfigError as error:
                self.refusals[str(error)] += 1
                continue
            placement = placements[key]
            if isinstance(placement, str):
                self.refusals[placement] += 1
                continue
            if candidate.chunk and candidate.chunk >= max(batch.segment_lengths):
                continue  # no segment is longer: it is another candidate
            self.schedules += 1
            bound = policy.of_placement(placement, batch, together(candidate, layout.mesh.pp, layout.microbatches))
            self._push(bound, layout, candidate)

    def _schedules_of(self, layout: Layout, setting: Setting) -> list[Candidate]:
        key = layout.mesh.pp, layout.microbatches, setting.segment_multiple
        if key not in self._schedules:
            self._schedules[key] = schedules_of(self.asked, layout)
        return self._schedules[key]

    def _take(self, task: Task, result: Result) -> None:
        if result.refused:
            self.refusals[result.refused] += 1
        elif result.bound is not None:  # it is slower, or does not fit
            if result.bound.peak_bytes > self.asked.memory_bytes:
                self._misses(result.bound.peak_bytes, task.layout, task.candidate)
        elif result.row is not None:
            self.simulated += 1
            row, key = result.row, task.layout.key
            if row.peak_bytes > self.asked.memory_bytes:
                self._misses(float(row.peak_bytes), row.layout, row.candidate)
            elif key not in self.best or _rank(row) < _rank(self.best[key]):
                self.best[key] = row

    def _construct(self, executor: Executor) -> None:
        """Of each of the best meshes an order built for its costs, with the stages and the memory of the best that was found."""
        tasks = []
        for row in sorted(self.best.values(), key=_rank)[: self.top]:
            fullest, ranks = max(row.figures.ranks, key=lambda rank: rank.peak_bytes), row.layout.mesh.pp
            room = min(self.asked.memory_bytes, 2 * fullest.peak_bytes) - (
                fullest.peak_bytes - fullest.peak_activation_bytes
            )
            built = (
                built_like(row.candidate, row.layout.microbatches, ranks, room, self.asked.families)
                if ranks > 1
                else []
            )
            tasks += [Task(self.asked, row.layout, candidate, row.step_s) for candidate in built[:1]]
        self.schedules += len(tasks)
        for task, future in [(task, executor.submit(refine, task)) for task in tasks]:
            self._take(task, future.result())
            self.progress(self.simulated, 0)

    def _left(self) -> int:
        """How many could still change the answer."""
        limits = {
            layout.key: self.limit_s(layout) for layout in {layout.key: layout for *_, layout, _ in self.queue}.values()
        }
        return sum(bound_s <= limits[layout.key] for bound_s, _, layout, _ in self.queue)


def _placed(setting: Setting, layout: Layout, candidate: Candidate) -> Placement | str:
    """A candidate's stages, or why it cannot have any."""
    try:
        return placed(setting, layout, candidate)
    except (ConfigError, ScheduleError) as error:
        return str(error)


def _rank(row: Row) -> tuple[Any, ...]:
    """The faster, then the leaner; then an order that is the same in every run."""
    return row.step_s, row.peak_bytes, row.layout.key, str(row.layout), row.schedule_told


def schedules_of(asked: Asked, layout: Layout) -> list[Candidate]:
    """Families and options that a layout may have, without a policy."""
    setting, ranks = asked.setting, layout.mesh.pp
    only = asked.families
    if not only:
        only = tuple(name for name in families.FAMILIES if name not in (*UNEVEN, CONSTRUCTED))
    if ranks == 1:
        only = tuple(name for name in ALONE if name in only)
        if not only:
            return []
    each = candidates(
        ranks, setting.shape.layers, setting.sequence_length, layout.setting(asked).segment_multiple,
        setting.shape.causal, only,
    )  # fmt: skip
    bare = [candidate for candidate in each if candidate.recompute == "none" and not candidate.chunk]
    if ranks > 1 and not setting.shape.opaque and asked.vocabulary != "last":
        bare = [*(bare if asked.vocabulary is None else ()), *map(spread, bare)]
    return [candidate for candidate in bare if _is_worth(asked, candidate, layout)]


def _is_worth(asked: Asked, candidate: Candidate, layout: Layout) -> bool:
    """Whether it has few enough actions, or its family has none with fewer."""
    given = dict(candidate.options)
    if asked.setting.shape.causal and (given.get("folds") == 1 or (SPREAD in candidate.options and candidate.evenness)):
        return False  # twice as many folds hide their messages; evenness is for memory, which a spread head leaves
    return bool(_pieces(candidate) <= 4) or _actions(candidate, layout) <= MOST_ACTIONS


def _pieces(candidate: Candidate) -> int:
    """Units of a micro-batch on each rank."""
    given = dict(candidate.options)
    return int(given.get("segments", 1) * given.get("stages_per_rank", 1))


def _actions(candidate: Candidate, layout: Layout) -> int:
    """Forwards and backwards of its layers, about."""
    return 2 * layout.microbatches * _pieces(candidate) * layout.mesh.pp


class _Here(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _executor(processes: int) -> Iterator[Executor]:
    """No fork: the caller may have threads; and no collector: see `plan`."""
    if processes == 1:
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=gc.disable) as pool:
        yield pool
