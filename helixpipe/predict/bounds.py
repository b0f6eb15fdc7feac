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
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work
from helixpipe.predict.estimate import Setting
from helixpipe.predict.placement import Placement, optimizer_shards
from helixpipe.predict.standing import trained
from helixpipe.predict.sums import Costs, Prices
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.order import times
from helixpipe.schedule.schedule import Schedule

ROUNDING = 1 - 1e-9
"""Sums in another order differ by as much: a bound stays below what it bounds."""


class Bound(NamedTuple):
    step_s: float
    peak_bytes: float


@dataclass(frozen=True, eq=False)
class PolicyBound:
    """A setting with what forwards keep, for so many ranks and micro-batches."""

    setting: Setting
    ranks: int
    microbatches: int
    prices: dict[Batch, Prices] = field(default_factory=dict)
    """Of the setting's costs, which policies share."""

    def costs(self, batch: Batch) -> Costs:
        """On a micro-batch that is cut so."""
        if batch not in self._costs:
            if batch not in self.prices:
                self.prices[batch] = Prices(self.setting.shape, self.setting.costs, batch)
            self._costs[batch] = Costs(self.setting, batch, self.prices[batch])
        return self._costs[batch]

    @cached_property
    def _costs(self) -> dict[Batch, Costs]:
        return {}

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
        whole = self.costs(self.setting.whole)  # sequences that are cut cost no less
        return math.fsum(count * sum(whole.of(part)[:2]) for part, count in _one_of_each(shape, vocabulary_shards))

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
        return _kept_of_layers(self.setting.shape, self.setting.whole, self.setting.keeping)

    def kept_of_stages(self, placement: Placement) -> list[float]:
        """Bytes of one accelerator that a forward of each stage keeps of a whole micro-batch; 0 where several ranks run it."""
        if placement not in self._kept_by_placement:
            whole = placement.kept(self.setting.whole, self.setting.keeping)
            self._kept_by_placement[placement] = [nbytes / self.setting.group for nbytes in whole]
        return self._kept_by_placement[placement]

    @cached_property
    def _kept_by_placement(self) -> dict[Placement, list[float]]:
        return {}

    @cached_property
    def _slowest_known(self) -> dict[tuple[Placement, Batch], float]:
        return {}

    def of_placement(self, small: Placement, batch: Batch, together: int = 1) -> Bound:
        """Of a family's schedules with these stages on these ranks, of sequences that are cut so. `together`: how many
        micro-batches a rank has run forward before its first backward.
        """
        setting = self.setting
        standing, sums_s = small.standing(setting), small.reduction_s(setting)
        if small.visits:  # all ranks' forwards, each rank's before its first backward, over the ranks
            all_bytes = sum(standing) + together * self._kept / setting.group
            mean_bytes = math.floor(all_bytes / self.ranks)
            return Bound(self.bound.step_s + sums_s * ROUNDING, max(max(standing), mean_bytes))
        kept_bytes = self.kept_of_stages(small)
        fullest = max(
            standing[rank] + math.floor(together * sum(kept_bytes[stage] for stage in mine))
            for rank, mine in enumerate(small.stages_of)
        )
        if (small, batch) not in self._slowest_known:
            self._slowest_known[small, batch] = self._slowest(small, self.costs(batch))
        return Bound((self._slowest_known[small, batch] + sums_s) * ROUNDING, max(0.0, fullest))

    def _slowest(self, small: Placement, costs: Costs) -> float:
        """Seconds of the slowest rank."""
        each = costs.of_stages(small)
        before_s = small.longest([sums.first_forward_s for sums in each])
        after_s = [0.0] * len(each) if small.splits else small.longest([sums.first_backward_s for sums in each])
        slowest = 0.0
        for mine in small.stages_of:
            # of the stages that can begin no sooner than one of them: what lies before all, their work, what lies behind all
            work_s, least_s = 0.0, math.inf
            for stage in sorted(mine, key=before_s.__getitem__, reverse=True):
                work_s += each[stage].forward_s + each[stage].backward_s
                least_s = min(least_s, after_s[stage])
                slowest = max(slowest, before_s[stage] + work_s * self.microbatches + least_s)
        return slowest


@lru_cache(maxsize=1024)
def _one_of_each(shape: ModelShape, vocabulary_shards: int) -> tuple[tuple[Part, int], ...]:
    """A part of each sort, all of which cost the same, and how many there are."""
    one: dict[Hashable, Part] = {}
    counts: Counter[Hashable] = Counter()
    for part in chain(shape.layers, shape.opaque, vocabulary_shards):
        counts[one.setdefault(shape.alike(part), part)] += 1
    return tuple(counts.items())


@lru_cache(maxsize=1024)
def _kept_of_layers(shape: ModelShape, whole: Batch, keeping: Keeping) -> int:
    """Bytes that one micro-batch's forwards keep of all layers, each tensor once."""
    work, found = Work(shape, whole, 0, keeping), {}  # type: Work, Kept
    for part in shape.chain()[1:-1] if keeping.recompute != "full" else ():
        found |= work.saved(part) if keeping.recompute == "none" else work.kept(part)
    return sum(found.values())


@lru_cache(maxsize=1024)
def _parameters(share: ModelShape) -> tuple[int, int]:
    """All that there are, and those that are trained."""
    owned = share.parameter_elements(share.chain())
    return sum(owned.values()), sum(trained(owned, share).values())


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
