"""final: final norm, and a transform where a model's head has one, x of layer L to f, which shards of the logits read."""

from __future__ import annotations

from helixpipe.parts.head import before_logits
from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.norm import norm_backward, norm_forward, norm_saved
from helixpipe.parts.part import LAST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


@register
class FinalKind(Kind):
    name = "final"
    reads = ("x",)
    makes = ("f",)
    alone = True
    divides = False
    splits = True

    def parameters(self, shape: ModelShape) -> Shapes:
        return before_logits(shape)

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return f"{LAST}.{name}"

    def moved_elements(self, shape: ModelShape) -> float:
        return (6.0 if shape.head_transform else 2.0) * shape.hidden

    def timed_as(self, part: Part) -> tuple[tuple[str, float], ...]:
        """Shards have their share of the whole head."""
        return (("norm", 1.0),)

    def saved(self, part: Part, work: Work) -> Kept:
        found = work.values(part.reads) | norm_saved(work, f"{part}.norm")
        if not work.shape.head_transform:
            return found
        h = work.shape.hidden * work.unit
        found |= {f"{part}.normed": h, f"{part}.dense": h, f"{part}.act": h}
        return found | norm_saved(work, f"{part}.dense_norm")

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        h = work.shape.hidden
        return {f"{part}.normed": ({"dense": h}, h)} if work.shape.head_transform else {}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        inside = 2 * work.shape.hidden * work.unit if work.shape.head_transform and not graph else 0
        return max(norm_forward(work), inside)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        if not work.shape.head_transform:
            return norm_backward(work)
        return max(norm_backward(work), 2 * work.shape.hidden * work.unit + self.largest_matrix(work))
