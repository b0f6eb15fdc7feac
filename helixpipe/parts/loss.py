"""loss: what all shards of the logits give of each token, joined to the cross entropy of the whole vocabulary."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, register
from helixpipe.parts.part import Part
from helixpipe.parts.work import Work


@register
class LossKind(Kind):
    name = "loss"
    reads = ("scores",)
    beside = ("targets",)
    makes = ("loss",)
    joins = True
    alone = True
    has_parameters = False
    divides = False

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        """The loss, summed over tokens."""
        return ()

    def moved(self, part: Part, work: Work) -> float:
        """Some passes over two numbers of each shard."""
        return 8.0 * part.shards * work.tokens

    def timed_as(self, part: Part) -> tuple[tuple[str, float], ...]:
        """Two numbers a token and shard, beside a vocabulary's: shards have their share of the whole head."""
        return ()

    def saved(self, part: Part, work: Work) -> Kept:
        """What each shard's log-sum-exp weighs."""
        return {f"{part}.shares": part.shards * work.wide_unit}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        return 2 * part.shards * work.wide_unit
