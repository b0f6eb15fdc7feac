"""Placement: a family's stages and who runs them, and what of a setting follows from these alone, whatever the order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work
from helixpipe.predict.estimate import Setting, reduction_of
from helixpipe.predict.keeping import kept
from helixpipe.predict.standing import Elements, owned_and_visiting, standing_of
from helixpipe.schedule.action import Pass
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Placement:
    """A family's stages and who runs them, from a schedule of as few micro-batches and segments as it takes."""

    schedule: Schedule
    shape: ModelShape
    may_split: bool = False
    """Whether other schedules with these stages put weight gradients off, though this one does not."""

    @cached_property
    def visits(self) -> bool:
        """Whether several ranks run a stage."""
        return any(len(ranks) > 1 for ranks in self.schedule.ranks_of)

    @cached_property
    def _likes(self) -> list[list[Hashable]]:
        """Of each stage what its parts are alike in."""
        return [[self.shape.alike(part) for part in stage.parts] for stage in self.schedule.stages]

    @cached_property
    def one(self) -> dict[Hashable, Part]:
        """One part of each sort, all of which cost the same."""
        parts = (part for stage in self.schedule.stages for part in stage.parts)
        return dict(zip(itertools.chain.from_iterable(self._likes), parts, strict=True))

    @cached_property
    def counts(self) -> list[list[tuple[Hashable, int]]]:
        """Of each stage how many parts of each sort it has."""
        return [list(Counter(likes).items()) for likes in self._likes]

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

    def kept(self, whole: Batch, keeping: Keeping) -> list[int]:
        """Bytes that a forward of each stage keeps, of all accelerators of a rank."""
        key = "kept", whole, keeping
        if key not in self._known:
            work, schedule = Work(self.shape, whole, 0, keeping), self.schedule
            found = []
            for stage, outputs, ranks in zip(schedule.stages, schedule.outputs, schedule.ranks_of, strict=True):
                waits = len(ranks) == 1 and not stage.in_any_order  # else it may be gone before others are there
                cut = chunks(stage, not keeping.recomputes, outputs) if waits else ()
                found.append(sum(sum(kept(chunk, work).values()) for chunk in cut))
            self._known[key] = found
        kept_bytes: list[int] = self._known[key]
        return kept_bytes

    def _owned(self, share: ModelShape) -> list[Elements]:
        if share not in self._known:
            self._known[share] = owned_and_visiting(self.schedule, share)[0]
        found: list[Elements] = self._known[share]
        return found

    @cached_property
    def _known(self) -> dict[object, Any]:
        return {}


def optimizer_shards(setting: Setting) -> int:
    return setting.data_parallel * setting.context_parallel if setting.optimizer == "sharded" else 1
