"""mlp: norm, MLP with or without a gate, norm and the residual add, y to the next layer's x. It may run in slices.

A model has the norm before, the one after, or both.
"""

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
        gate = linear("gate", ffn, h, shape.bias, shape.lora) if shape.gated else {}
        up_down = linear("up", ffn, h, shape.bias, shape.lora) | linear("down", h, ffn, shape.bias, shape.lora)
        before = norm_parameters(shape, "norm.") if shape.norms_before else {}
        after = norm_parameters(shape, "after.") if shape.norms_after else {}
        return before | gate | up_down | after

    def chunk(self, keeping: Keeping) -> int:
        return keeping.mlp_chunk

    def moved_elements(self, shape: ModelShape) -> float:
        norms = shape.norms_before + shape.norms_after
        return (1.0 + 2.0 * (norms + 1)) * shape.hidden + (3.0 if shape.gated else 2.0) * shape.ffn

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
        found: Kept = reads | norm_saved(work, f"{part}.norm") if shape.norms_before else {}
        found |= {f"{part}.wide": wides * unit * shape.ffn} | self.narrow(part, work)
        if self.keeps_multiplied(shape):
            found[self._multiplied(part, work)] = (
                unit * shape.hidden * keeping.tensor_parallel
            )  # gathered, on each rank
        if shape.norms_after:
            found |= {f"{part}.made": unit * shape.hidden} | norm_saved(work, f"{part}.after")
        return found

    @staticmethod
    def keeps_multiplied(shape: ModelShape) -> bool:
        """Whether anything that is trained multiplies what the first linear layers read."""
        return shape.lora is None or not {"gate", "up"}.isdisjoint(shape.lora.targets)

    @staticmethod
    def _multiplied(part: Part, work: Work) -> str:
        """The name of what the first linear layers read: y itself where there is no norm of it."""
        return f"{part}.normed" if work.shape.norms_before else work.gathered(part.reads[0])

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        shape = work.shape
        gathered = shape.hidden * work.keeping.tensor_parallel
        ups = dict.fromkeys(("gate", "up") if shape.gated else ("up",), shape.ffn)
        return {self._multiplied(part, work): (ups, gathered), f"{part}.act": ({"down": gathered}, shape.ffn)}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """What the last linear layer reads, and what the activation reads where no graph keeps it.

        With a norm after, what the last linear layer makes is not yet what the part does.
        """
        if work.slices(part):
            piece = work.sliced(part)
            return piece.shape.hidden * piece.unit + self.forward_workspace(part, piece, graph=False)
        shape, h = work.shape, work.shape.hidden * work.keeping.tensor_parallel
        kept = 0 if graph else (2 if shape.gated else 1) * shape.ffn
        kept_too = graph and self.keeps_multiplied(shape)
        normed = 0 if kept_too else shape.norms_before * (h + norm_forward(work) // work.unit)
        most = max(kept + shape.ffn, normed) * work.unit
        if not shape.norms_after:
            return most
        made = shape.hidden * work.unit
        return max(most - made, norm_forward(work)) if graph else max(most, made + norm_forward(work))

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
