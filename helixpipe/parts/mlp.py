"""mlp: norm, GELU or SwiGLU MLP and the residual add, y to the next layer's x. It may run in slices."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.norm import norm_backward, norm_forward, norm_parameters, norm_saved
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping, Work


@register
class MLPKind(Kind):
    name = "mlp"
    reads = ("y",)
    makes = ("x",)
    ends_layer = True
    splits = True
    units = 2

    def parameters(self, shape: ModelShape) -> Shapes:
        h, ffn = shape.hidden, shape.ffn
        gate = linear("gate", ffn, h, shape.bias) if shape.gated else {}
        up_down = linear("up", ffn, h, shape.bias) | linear("down", h, ffn, shape.bias)
        return norm_parameters(shape, "norm.") | gate | up_down

    def chunk(self, keeping: Keeping) -> int:
        return keeping.mlp_chunk

    def moved_elements(self, shape: ModelShape) -> float:
        return 5.0 * shape.hidden + (3.0 if shape.gated else 2.0) * shape.ffn

    @property
    def exchanges(self) -> int:
        return 2

    def saved(self, part: Part, work: Work) -> Kept:
        reads = work.values(part.reads)
        if work.slices(part):
            return reads
        shape, keeping = work.shape, work.keeping
        unit = work.tokens * keeping.element_bytes
        wides = 2 if shape.gated else 1
        if keeping.keeps_activated:  # and, of a gated one, what its gate became
            wides += 2 if shape.gated else 1
        inner = {
            f"{part}.normed": unit * shape.hidden * keeping.tensor_parallel,  # gathered, on each rank
            f"{part}.wide": wides * unit * shape.ffn,
        }
        return reads | norm_saved(work, f"{part}.norm") | inner

    def linears(self, part: Part, work: Work) -> dict[str, tuple[int, int]]:
        shape = work.shape
        gathered = shape.hidden * work.keeping.tensor_parallel
        ups = 2 * shape.ffn if shape.gated else shape.ffn
        return {f"{part}.normed": (ups, gathered), f"{part}.act": (gathered, shape.ffn)}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """What the last linear layer reads, and what the activation reads where no graph keeps it."""
        if work.slices(part):
            piece = work.sliced(part)
            return piece.shape.hidden * piece.unit + self.forward_workspace(part, piece, graph=False)
        shape, h = work.shape, work.shape.hidden * work.keeping.tensor_parallel
        kept = 0 if graph else (2 if shape.gated else 1) * shape.ffn
        normed = 0 if graph else h + norm_forward(work) // work.unit
        return max(kept + shape.ffn, normed) * work.unit

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """At the last linear layer: its input made anew and the weight's gradient; then those of what the activation reads."""
        if work.slices(part):
            piece = work.sliced(part)
            graph = sum(self.saved(part, piece).values())
            result = 0 if unread else work.value_bytes(part.reads[0])  # else in the place of what it is made from
            return result + graph + self.backward_workspace(part, piece)
        shape = work.shape
        made = shape.ffn * work.unit
        gradients = 2 * made if shape.gated else made
        return max(gradients + self.largest_matrix(work), norm_backward(work))
