"""proj: attention's output projection, a norm of it where a model has one, and the residual add; o and x to y."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.norm import norm_backward, norm_forward, norm_parameters, norm_saved
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
        found = linear("o", shape.hidden, shape.q_size, shape.o_bias or shape.bias, shape.lora)
        return found | (norm_parameters(shape, "norm.") if shape.norms_after else {})

    def moved_elements(self, shape: ModelShape) -> float:
        return (5.0 if shape.norms_after else 3.0) * shape.hidden

    @property
    def exchanges(self) -> int:
        return 1

    def saved(self, part: Part, work: Work) -> Kept:
        """o, and what a norm reads: the residual add keeps nothing."""
        found = work.values(part.reads[:1])
        if work.shape.norms_after:
            found |= {f"{part}.made": work.shape.hidden * work.unit} | norm_saved(work, f"{part}.norm")
        return found | self.narrow(part, work)

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        gathered = work.shape.hidden * work.keeping.tensor_parallel  # the gradient of what is scattered
        return {str(part.reads[0]): ({"o": gathered}, work.shape.q_size)}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """What the norm reads, beside what it makes."""
        if not work.shape.norms_after:
            return 0
        return norm_forward(work) + (0 if graph else work.shape.hidden * work.unit)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The gradient of x is that of y; of what a norm read there is one in its place."""
        gathered = work.shape.hidden * (work.keeping.tensor_parallel - 1) * work.unit
        product = work.value_bytes(part.reads[0]) + gathered + self.largest_matrix(work)
        return max(norm_backward(work), product) if work.shape.norms_after else product
