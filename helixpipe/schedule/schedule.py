"""Schedule: stages, and one ordered list of actions per rank. Nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from helixpipe.parts.part import Part, Value, chain, loss_of, vocabulary_shards
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.stage import Edge, Stage, edges


@dataclass(frozen=True)
class Schedule:
    """WHAT runs WHERE and in which ORDER.

    `stages` cut the model's chain of parts; `ranks[r]` is what rank r does, in order. All else, the
    placement, the micro-batch count, the edges, is derived from these two.
    """

    stages: tuple[Stage, ...]
    ranks: tuple[tuple[Action, ...], ...]

    @cached_property
    def layers(self) -> int:
        return max(part.layer for stage in self.stages for part in stage.parts)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the model, as data flows: stages of shards may stand anywhere."""
        parts = [part for stage in self.stages for part in stage.parts]
        return chain(self.layers, {part.layer for part in parts if part.about.opaque}, vocabulary_shards(parts))

    @cached_property
    def microbatches(self) -> int:
        return 1 + max((action.microbatch for order in self.ranks for action in order), default=-1)

    @cached_property
    def segments(self) -> int:
        return 1 + max((action.segment for order in self.ranks for action in order), default=-1)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        return edges(self.stages)

    @cached_property
    def edges_into(self) -> tuple[tuple[Edge, ...], ...]:
        """Per stage, the edges that bring its inputs."""
        return tuple(tuple(e for e in self.edges if e.consumer == s) for s in range(len(self.stages)))

    @cached_property
    def edges_out_of(self) -> tuple[tuple[Edge, ...], ...]:
        """Per stage, the edges that take its outputs on."""
        return tuple(tuple(e for e in self.edges if e.producer == s) for s in range(len(self.stages)))

    @cached_property
    def outputs(self) -> tuple[frozenset[Value], ...]:
        """Per stage, the values that other stages read, and the loss, which nobody does."""
        loss = loss_of(self.layers)
        found = [{value for edge in edges for value in edge.values} for edges in self.edges_out_of]
        made = [{value for part in stage.parts for value in part.makes} for stage in self.stages]
        return tuple(frozenset(out | ({loss} & here)) for out, here in zip(found, made, strict=True))

    @cached_property
    def placement(self) -> dict[tuple[int, int], int]:
        """(stage, micro-batch) -> the rank that runs it."""
        return {(a.stage, a.microbatch): rank for rank, order in enumerate(self.ranks) for a in order}

    @cached_property
    def placed(self) -> frozenset[Action]:
        """All actions of all ranks."""
        return frozenset(action for order in self.ranks for action in order)

    @cached_property
    def ranks_of(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the ranks that run it for some micro-batch, ascending."""
        found: list[set[int]] = [set() for _ in self.stages]
        for (stage, _), rank in self.placement.items():
            found[stage].add(rank)
        return tuple(tuple(sorted(ranks)) for ranks in found)

    def owner(self, stage: int) -> int:
        """The rank that owns the stage's parameters: its home, or the one rank that runs it."""
        home = self.stages[stage].home
        return self.ranks_of[stage][0] if home is None else home

    @cached_property
    def input_gradient(self) -> dict[tuple[int, int, int], Pass]:
        """(stage, micro-batch, segment) -> the pass, B or I, that makes its input gradients."""
        return {(a.stage, a.microbatch, a.segment): a.kind for order in self.ranks for a in order if a.kind in BACKWARD}

    def backward_of(self, stage: int, microbatch: int, segment: int) -> Action:
        """The B or I action of a stage's forward."""
        kind = self.input_gradient.get((stage, microbatch, segment), Pass.B)
        return Action(stage, kind, microbatch, segment)

    def dependencies(self, action: Action) -> list[Action]:
        """The actions that must end before `action` starts.

        F: the stages it reads from, and the segment before (its keys and values).
        B, I: its own F (or R), the stages that read from it, and the segment after.
        W: its own I. R: its own F. Segments of shards of the vocabulary, and of what joins them, do not wait for one another.
        """
        stage, kind, mb, seg = action
        if kind is Pass.F:
            found = [Action(e.producer, Pass.F, mb, seg) for e in self.edges_into[stage]]
            return [*found, Action(stage, Pass.F, mb, seg - 1)] if seg and stage not in self._in_any_order else found
        if kind is Pass.W:
            return [Action(stage, Pass.I, mb, seg)]
        if kind is Pass.R:
            return [Action(stage, Pass.F, mb, seg)]
        found = [Action(stage, Pass.F, mb, seg)]
        found += [self.backward_of(e.consumer, mb, seg) for e in self.edges_out_of[stage]]
        waits = seg + 1 < self.segments and stage not in self._in_any_order
        return [*found, self.backward_of(stage, mb, seg + 1)] if waits else found

    @cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """`dependencies` of every action, all by number: rank by rank, as they stand. One that is in no order is -1."""
        units, segments = self.microbatches * self.segments, self.segments
        number = {kind: [[-1] * units for _ in self.stages] for kind in Pass}
        actions = [action for order in self.ranks for action in order]
        for i, (stage, kind, mb, seg) in enumerate(actions):
            number[kind][stage][mb * segments + seg] = i
        forward, inputs = number[Pass.F], number[Pass.I]
        backward = [
            [b if i < 0 else i for b, i in zip(*both, strict=True)] for both in zip(number[Pass.B], inputs, strict=True)
        ]
        makers = [[forward[edge.producer] for edge in edges] for edges in self.edges_into]
        readers = [[backward[edge.consumer] for edge in edges] for edges in self.edges_out_of]
        last, apart = segments - 1, self._in_any_order
        found: list[tuple[int, ...]] = []
        for stage, kind, mb, seg in actions:
            unit = mb * segments + seg
            if kind is Pass.F:
                needed = [each[unit] for each in makers[stage]]
                if seg and stage not in apart:
                    needed.append(forward[stage][unit - 1])
            elif kind is Pass.W:
                needed = [inputs[stage][unit]]
            else:
                needed = [forward[stage][unit]]
                if kind is not Pass.R:
                    needed += [each[unit] for each in readers[stage]]
                    if seg < last and stage not in apart:
                        needed.append(backward[stage][unit + 1])
            found.append(tuple(needed))
        return tuple(found)

    @cached_property
    def _in_any_order(self) -> frozenset[int]:
        return frozenset(s for s, stage in enumerate(self.stages) if stage.in_any_order)

    def forward_only(self) -> Schedule:
        """The same schedule with its forwards alone: what an evaluation runs."""
        return Schedule(self.stages, tuple(tuple(a for a in order if a.kind is Pass.F) for order in self.ranks))
