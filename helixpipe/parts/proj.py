"""proj: attention's output projection and the residual add; o and x to y."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


@register
class ProjKind(Kind):
    name = "proj"
    reads = ("o", "x")
    makes = ("y",)
    splits = True

    def parameters(self, shape: ModelShape) -> Shapes:
        return linear("o", shape.hidden, shape.q_size, shape.bias)

    def moved_elements(self, shape: ModelShape) -> float:
        return 3.0 * shape.hidden

    @property
    def exchanges(self) -> int:
        return 1

    def saved(self, part: Part, work: Work) -> Kept:
        """o alone: the residual add keeps nothing."""
        return work.values(part.reads[:1])

    def linears(self, part: Part, work: Work) -> dict[str, tuple[int, int]]:
        gathered = work.shape.hidden * work.keeping.tensor_parallel  # the gradient of what is scattered
        return {str(part.reads[0]): (gathered, work.shape.q_size)}

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The gradient of x is that of y."""
        gathered = work.shape.hidden * (work.keeping.tensor_parallel - 1) * work.unit
        return work.value_bytes(part.reads[0]) + gathered + self.largest_matrix(work)
