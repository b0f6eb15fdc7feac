"""Sums: what parts and stages take of a micro-batch, whatever the order: what bounds are made of.

part costs ──► Prices (by segment; policies share them) ──► Costs (of a policy: all segments, the first one) ──► of stages
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Work
from helixpipe.predict.cost import PartCosts
from helixpipe.predict.estimate import Setting
from helixpipe.predict.placement import Placement


class Sums(NamedTuple):
    """Seconds of a part on one micro-batch: all segments, and the first."""

    forward_s: float
    backward_s: float
    first_forward_s: float
    first_backward_s: float
    again_s: float
    """Of the backward, what was run before."""


@dataclass(frozen=True, eq=False)
class Priced:
    """Seconds of a part, of each segment: forward, and what of its backward is no recompute."""

    forward_s: list[float]
    backward_s: list[float]

    @cached_property
    def sums(self) -> tuple[float, float]:
        return math.fsum(self.forward_s), math.fsum(self.backward_s)


class Prices:
    """Of all parts on a micro-batch that is cut so, whatever forwards keep: policies, and layouts of one group, share them."""

    def __init__(self, shape: ModelShape, costs: PartCosts, batch: Batch) -> None:
        self._shape, self._costs, self._batch = shape, costs, batch
        self._known: dict[Hashable, Priced] = {}

    def of(self, part: Part) -> Priced:
        like = self._shape.alike(part)
        if like not in self._known:
            costs, batch = self._costs, self._batch
            segments = range(len(batch.segment_lengths))
            forward = [costs.forward_s(part, batch, segment) for segment in segments]
            backward = [costs.input_s(part, batch, s) + costs.weight_s(part, batch, s) for s in segments]
            self._known[like] = Priced(forward, backward)
        return self._known[like]


class Costs:
    """Of all parts of a setting on a micro-batch that is cut so."""

    def __init__(self, setting: Setting, batch: Batch, prices: Prices | None = None) -> None:
        self._setting, self._batch = setting, batch
        self._prices = Prices(setting.shape, setting.costs, batch) if prices is None else prices
        self._known: dict[Hashable, Sums] = {}
        self._of_stages: dict[Placement, list[Sums]] = {}

    def of(self, part: Part) -> Sums:
        like = self._setting.shape.alike(part)
        if like not in self._known:
            self._known[like] = self._priced(part)
        return self._known[like]

    def _priced(self, part: Part) -> Sums:
        """As `action_seconds` puts actions together, at the least."""
        setting, priced = self._setting, self._prices.of(part)
        about = setting.shape.about(part)
        runs_again = setting.keeping.runs_again(part)
        sliced = [p for p in about.inside(part) if setting.shape.about(p).chunk(setting.keeping) > 0]
        if not sliced:
            (forward_s, backward_s), first_s = priced.sums, priced.forward_s[0]
            again_s = forward_s if runs_again else 0.0
            first_again_s = first_s if runs_again else 0.0
            return Sums(forward_s, backward_s + again_s, first_s, priced.backward_s[0] + first_again_s, again_s)
        again = []
        for segment, runs in enumerate(priced.forward_s):
            work = Work(setting.shape, self._batch, segment, setting.keeping)
            more = math.fsum(self._prices.of(p).forward_s[segment] for p in sliced if work.slices(p))
            again.append(max(runs, more) if runs_again else more)
        backward = [taken + more for taken, more in zip(priced.backward_s, again, strict=True)]
        forward = priced.forward_s
        return Sums(math.fsum(forward), math.fsum(backward), forward[0], backward[0], math.fsum(again))

    def of_stages(self, small: Placement) -> list[Sums]:
        """The same of each stage."""
        if small not in self._of_stages:
            known = {like: self.of(part) for like, part in small.one.items()}
            found = []
            for counts in small.counts:
                columns = zip(*([count * each for each in known[like]] for like, count in counts), strict=True)
                found.append(Sums(*map(math.fsum, columns)))
            self._of_stages[small] = found
        return self._of_stages[small]

    def once_s(self, part: Part) -> float:
        """Forward and backward, nothing again."""
        sums = self.of(part)
        return sums.forward_s + sums.backward_s - sums.again_s
