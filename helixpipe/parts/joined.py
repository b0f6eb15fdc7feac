"""joined: what all shards of the table give, summed, scaled, with learned positions and a norm where a model has them."""

from __future__ import annotations

from helixpipe.parts.embed import rows_saved, rows_workspace
from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.norm import norm_backward, norm_parameters
from helixpipe.parts.part import FIRST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


@register
class JoinedKind(Kind):
    """Of each token one shard has a row, so the sum is that row: x is what `embed` makes, to the last bit."""

    name = "joined"
    reads = ("e",)
    beside = ("start",)
    makes = ("x",)
    joins = True
    graphed = True
    alone = True
    divides = False

    def parameters(self, shape: ModelShape) -> Shapes:
        found: Shapes = {"positions.weight": (shape.context, shape.hidden)} if shape.positions == "learned" else {}
        return found | (norm_parameters(shape, "norm.") if shape.embed_norm else {})

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return f"{FIRST}.{name}"

    def forward_flops(self, part: Part, work: Work) -> float:
        return 0.0

    def moved(self, part: Part, work: Work) -> float:
        """Each shard's is read and added to the sum."""
        passes = 3 * part.shards - 1 + 2 * (work.shape.embed_scale != 1) + 2 * work.shape.embed_norm
        return float(passes * work.shape.hidden * work.tokens)

    def timed_as(self, part: Part) -> tuple[tuple[str, float], ...]:
        """As many passes over x."""
        return ((FIRST, float(part.shards)),)

    def saved(self, part: Part, work: Work) -> Kept:
        return rows_saved(part, work)

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        return rows_workspace(work, graph)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The gradient of the sum, where it is not that of x, and that of learned positions."""
        positions = self.largest_matrix(work)
        if work.shape.embed_norm:
            return max(norm_backward(work), positions)
        return (work.shape.hidden * work.unit if work.shape.embed_scale != 1 else 0) + positions
