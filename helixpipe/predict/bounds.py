"""Bounds: what no schedule of a layout can be faster than, or hold less than, found without building it.

    rank r   |--- before ---|---------- its own work ----------|--- after ---|
             forwards of the stages before it,                  the same stages' backwards, of the first segment
             of the first segment

Each is a true lower bound of the simulated step and of the simulated bytes: a rank runs its actions one by one, whatever
messages do; it starts when its first stage's input can be there, and when it has ended the stages before it have a backward to
run still. At the moment of a micro-batch's first backward every rank keeps the whole of its share of that micro-batch.

    Of a policy      all ranks' work over the ranks; parameters and one micro-batch over the ranks          no stage is known
    Of a placement   the slowest and the fullest rank by the above                        stages, from a schedule of one micro-batch
    Of a schedule    messages that take no time; what forwards keep, in the schedule's own order            a schedule, not lowered
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Work
from helixpipe.predict.estimate import Setting, reduction_of
from helixpipe.predict.keeping import kept
from helixpipe.predict.standing import Elements, owned_and_visiting, standing_of, trained
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.order import times
from helixpipe.schedule.schedule import Schedule

ROUNDING = 1 - 1e-9
"""Sums in another order differ by as much: a bound stays below what it bounds."""


class Sums(NamedTuple):
    """Seconds of a part on one micro-batch: all segments, and the first."""

    forward_s: float
    backward_s: float
    first_forward_s: float
    first_backward_s: float
    again_s: float
    """Of the backward, what was run before."""


class Bound(NamedTuple):
    step_s: float
    peak_bytes: float


class Costs:
    """Of all parts of a setting on a micro-batch that is cut so."""

    def __init__(self, setting: Setting, batch: Batch) -> None:
        self._setting, self._batch = setting, batch
        self._known: dict[object, Sums] = {}

    def of(self, part: Part) -> Sums:
        like = self._setting.shape.alike(part)
        if like not in self._known:
            self._known[like] = self._priced(part)
        return self._known[like]

    def _priced(self, part: Part) -> Sums:
        """As `action_seconds` puts actions together, at the least."""
        setting, batch = self._setting, self._batch
        costs, about = setting.costs, setting.shape.about(part)
        forward, backward, again = [], [], []
        for segment in range(len(batch.segment_lengths)):
            work = Work(setting.shape, batch, segment, setting.keeping)
            runs = costs.forward_s(part, batch, segment)
            more = math.fsum(costs.forward_s(p, batch, segment) for p in about.inside(part) if work.slices(p))
            again.append(max(runs, more) if setting.keeping.runs_again(part) else more)
            forward.append(runs)
            backward.append(costs.input_s(part, batch, segment) + costs.weight_s(part, batch, segment) + again[-1])
        return Sums(math.fsum(forward), math.fsum(backward), forward[0], backward[0], math.fsum(again))

    def once_s(self, part: Part) -> float:
        """Forward and backward, nothing again."""
        sums = self.of(part)
        return sums.forward_s + sums.backward_s - sums.again_s


@dataclass(frozen=True)
class PolicyBound:
    """A setting with what forwards keep, for so many ranks and micro-batches."""

    setting: Setting
    ranks: int
    microbatches: int

    @cached_property
    def whole(self) -> Costs:
        """Of sequences that are not cut: cut ones cost no less."""
        return Costs(self.setting, self.setting.whole)

    @cached_property
    def bound(self) -> Bound:
        """Of any schedule."""
        setting = self.setting
        step_s = min(map(self._work_s, (0, self.ranks))) * self.microbatches / self.ranks
        return Bound(step_s * ROUNDING, math.floor((self._standing + self._kept / setting.group) / self.ranks))

    def _work_s(self, vocabulary_shards: int) -> float:
        """One micro-batch through the model, whose vocabulary has so many shards; 0 is whole."""
        shape = self.setting.shape
        if vocabulary_shards and shape.opaque:
            return math.inf  # there is no such schedule
        parts = chain(shape.layers, shape.opaque, vocabulary_shards)
        return math.fsum(sum(self.whole.of(part)[:2]) for part in parts)

    @cached_property
    def _standing(self) -> float:
        """All ranks' together."""
        keeping = self.setting.keeping
        whole, updated = _parameters(self.setting.share)
        narrow, wide = keeping.element_bytes, keeping.wide_bytes
        copy = narrow if narrow != wide else 0
        weights = updated * (2 * wide + copy) + (whole - updated) * narrow
        return weights + 2 * wide * updated / optimizer_shards(self.setting)

    @cached_property
    def _kept(self) -> int:
        """One micro-batch's of all layers, each tensor once."""
        work = Work(self.setting.shape, self.setting.whole, 0, self.setting.keeping)
        found: dict[str, int] = {}
        policy = self.setting.keeping.recompute
        for part in self.setting.shape.chain()[1:-1] if policy != "full" else ():
            found |= work.saved(part) if policy == "none" else work.kept(part)
        return sum(found.values())

    def kept_of_stages(self, placement: Placement) -> list[float]:
        """Bytes of one accelerator that a forward of each stage keeps of a whole micro-batch; 0 where several ranks run it."""
        if id(placement) not in self._kept_by_placement:
            self._kept_by_placement[id(placement)] = self._kept_of_stages(placement.schedule)
        return self._kept_by_placement[id(placement)]

    @cached_property
    def _kept_by_placement(self) -> dict[int, list[float]]:
        return {}

    def _kept_of_stages(self, schedule: Schedule) -> list[float]:
        work = Work(self.setting.shape, self.setting.whole, 0, self.setting.keeping)
        found = []
        for stage, outputs, ranks in zip(schedule.stages, schedule.outputs, schedule.ranks_of, strict=True):
            waits = len(ranks) == 1 and not stage.in_any_order  # else it may be gone before others are there
            cut = chunks(stage, not self.setting.keeping.recomputes, outputs) if waits else ()
            found.append(sum(sum(kept(chunk, work).values()) for chunk in cut) / self.setting.group)
        return found

    def of_placement(
        self, small: Placement, costs: Costs, standing: Sequence[float], sums_s: float, together: int = 1
    ) -> Bound:
        """Of a family's schedules with these stages on these ranks. `sums_s`: what its reduction takes; `together`: how many
        micro-batches a rank has run forward before its first backward.
        """
        if small.visits:  # all ranks' forwards, each rank's before its first backward, over the ranks
            all_bytes = sum(standing) + together * self._kept / self.setting.group
            mean_bytes = math.floor(all_bytes / self.ranks)
            return Bound(self.bound.step_s + sums_s * ROUNDING, max(max(standing), mean_bytes))
        stages = [[costs.of(part) for part in stage.parts] for stage in small.schedule.stages]
        each = [tuple(math.fsum(column) for column in zip(*parts, strict=True)) for parts in stages]
        kept_bytes = self.kept_of_stages(small)
        before_s = small.longest([sums[2] for sums in each])
        after_s = [0.0] * len(each) if small.splits else small.longest([sums[3] for sums in each])
        slowest, fullest = 0.0, 0.0
        for rank, mine in enumerate(small.stages_of):
            fullest = max(fullest, standing[rank] + math.floor(together * sum(kept_bytes[stage] for stage in mine)))
            # of the stages that can begin no sooner than one of them: what lies before all, their work, what lies behind all
            for first in mine:
                later = [stage for stage in mine if before_s[stage] >= before_s[first]]
                busy_s = math.fsum(each[stage][0] + each[stage][1] for stage in later) * self.microbatches
                slowest = max(slowest, before_s[first] + busy_s + min(after_s[stage] for stage in later))
        return Bound((slowest + sums_s) * ROUNDING, fullest)


@dataclass(frozen=True)
class Placement:
    """A family's stages and who runs them, from a schedule of as few micro-batches and segments as it takes."""

    schedule: Schedule
    may_split: bool = False
    """Whether other schedules with these stages put weight gradients off, though this one does not."""

    @cached_property
    def visits(self) -> bool:
        """Whether several ranks run a stage."""
        return any(len(ranks) > 1 for ranks in self.schedule.ranks_of)

    def longest(self, seconds: Sequence[float]) -> list[float]:
        """Of each stage the longest way to it through those that it reads from: a backward's, the other way round."""
        found: dict[int, float] = {}

        def to(stage: int) -> float:
            if stage not in found:
                edges = self.schedule.edges_into[stage]
                found[stage] = max((to(edge.producer) + seconds[edge.producer] for edge in edges), default=0.0)
            return found[stage]

        for stage in range(len(seconds)):  # in order, so that no way is walked far
            to(stage)
        return [found[stage] for stage in range(len(seconds))]

    @cached_property
    def splits(self) -> bool:
        """Whether weight gradients are put off, so that a rank may end with one."""
        return self.may_split or any(action.kind is Pass.W for action in self.schedule.placed)

    @cached_property
    def stages_of(self) -> list[list[int]]:
        """Of each rank."""
        found: list[list[int]] = [[] for _ in self.schedule.ranks]
        for stage, ranks in enumerate(self.schedule.ranks_of):
            for rank in ranks:
                found[rank].append(stage)
        return found

    def standing(self, setting: Setting) -> list[float]:
        """Bytes of each rank's accelerators that do not move."""
        key = "standing", setting.share, setting.keeping.element_bytes, optimizer_shards(setting)
        if key not in self._known:
            found = standing_of(self._owned(setting.share), setting.share, setting.keeping, optimizer_shards(setting))
            self._known[key] = [float(sum(each)) for each in found]
        standing: list[float] = self._known[key]
        return standing

    def reduction_s(self, setting: Setting) -> float:
        """What summing gradients takes."""
        key = "sums", setting.shape, setting.keeping.element_bytes, setting.mesh, setting.optimizer, setting.links
        if key not in self._known:
            self._known[key] = reduction_of(self._owned(setting.shape), self._owned(setting.share), setting)
        return float(self._known[key])

    def _owned(self, share: ModelShape) -> list[Elements]:
        if share not in self._known:
            self._known[share] = owned_and_visiting(self.schedule, share)[0]
        found: list[Elements] = self._known[share]
        return found

    @cached_property
    def _known(self) -> dict[object, Any]:
        return {}


@lru_cache(maxsize=64)
def _parameters(share: ModelShape) -> tuple[int, int]:
    """All that there are, and those that are trained."""
    owned = share.parameter_elements(share.chain())
    return sum(owned.values()), sum(trained(owned, share).values())


def optimizer_shards(setting: Setting) -> int:
    return setting.data_parallel * setting.context_parallel if setting.optimizer == "sharded" else 1


def peak_of_order(
    schedule: Schedule, standing: Sequence[float], batch: Batch, kept_of_stages: Sequence[float]
) -> float:
    """Bytes of the fullest rank's accelerators, at least: what stands, and what forwards keep in the schedule's order."""
    shares = [length / batch.sequence_length for length in batch.segment_lengths]
    fullest = 0.0
    for stands, order in zip(standing, schedule.ranks, strict=True):
        live = most = 0.0
        for stage, kind, _, segment in order:
            if kind is Pass.F:
                live += kept_of_stages[stage] * shares[segment]
                most = max(most, live)
            elif kind in BACKWARD:
                live -= kept_of_stages[stage] * shares[segment]
        fullest = max(fullest, stands + math.floor(most * ROUNDING))
    return fullest


def makespan_of_order(schedule: Schedule, seconds: Callable[[Action], float]) -> float:
    """With messages that take no time."""
    return times(schedule, seconds).makespan * ROUNDING
