"""head: final norm, a transform where a model has one, logits and cross entropy, x of layer L to the loss.

It may run in slices.
"""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.norm import norm_backward, norm_parameters, norm_saved
from helixpipe.parts.part import FIRST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping, Work

IGNORED = -100
"""A target that counts for nothing, as in torch's cross entropy."""


def before_logits(shape: ModelShape) -> Shapes:
    """The parameters of the final norm, and of the transform where a model has one."""
    h, found = shape.hidden, norm_parameters(shape, "norm.")
    if shape.head_transform:
        found |= linear("dense", h, h, shape.bias) | norm_parameters(shape, "dense_norm.")
    return found


@register
class HeadKind(Kind):
    name = "head"
    reads = ("x",)
    beside = ("targets",)
    makes = ("loss",)
    alone = True
    divides = False
    splits = True

    def parameters(self, shape: ModelShape) -> Shapes:
        """A tied head lists its table too: see `parameter_name`."""
        return before_logits(shape) | linear("output", shape.vocabulary, shape.hidden, shape.head_transform)

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        if name == "output.weight" and shape.tied:
            return f"{FIRST}.tokens.weight"
        if name == "output.bias":  # the head's own, whosever the table is
            return "head.bias"
        return f"head.{name}"

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        """The loss, summed over tokens."""
        return ()

    def chunk(self, keeping: Keeping) -> int:
        return keeping.head_chunk

    def moved_elements(self, shape: ModelShape) -> float:
        normed = (6.0 if shape.head_transform else 2.0) * shape.hidden
        return normed + (6.0 if shape.head_softcap else 4.0) * shape.vocabulary

    @property
    def vocabulary_exchanges(self) -> int:
        """Each rank has its own words' logits: a gather of the normed x, and a reduce-scatter of its gradient.

        The cross entropy's all-reduces of three numbers a token are left out: 24 bytes beside 2h of each of these.
        """
        return 1

    def saved(self, part: Part, work: Work) -> Kept:
        reads = work.values(part.reads)
        if work.slices(part):
            return reads
        shape, h = work.shape, work.shape.hidden * work.unit
        inner = {f"{part}.normed": h, f"{part}.logits": shape.vocabulary * work.wide_unit}
        if shape.head_transform:
            inner |= {f"{part}.dense": h, f"{part}.act": h, self._multiplied(part, work): h}
            inner |= norm_saved(work, f"{part}.dense_norm")
        if shape.head_softcap:
            inner[f"{part}.capped"] = shape.vocabulary * work.unit
        return reads | norm_saved(work, f"{part}.norm") | inner

    @staticmethod
    def _multiplied(part: Part, work: Work) -> str:
        """The name of what the table is multiplied by."""
        return f"{part}.transformed" if work.shape.head_transform else f"{part}.normed"

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        h = work.shape.hidden
        dense = {f"{part}.normed": ({"dense": h}, h)} if work.shape.head_transform else {}
        return dense | {self._multiplied(part, work): ({"output": work.shape.vocabulary}, h)}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """Logits beside their log-softmax, which a graph keeps."""
        if work.slices(part):
            return self.forward_workspace(part, work.sliced(part), graph=False)
        narrow = 0 if work.is_wide else work.unit
        kept = work.unit if graph and work.shape.head_softcap else 0  # the logits are what the softcap made
        return work.shape.vocabulary * (work.wide_unit * (1 if graph else 2) + narrow - kept)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The gradients of the log-softmax and of the logits."""
        if work.slices(part):
            piece = work.sliced(part)
            graph = sum(self.saved(part, piece).values())
            return work.value_bytes(part.reads[0]) + graph + self.backward_workspace(part, piece)
        both = 2 * work.shape.vocabulary * work.wide_unit
        after = work.shape.vocabulary * work.unit + work.shape.hidden * work.unit + self.largest_matrix(work)
        return max(both, after, norm_backward(work) + work.shape.hidden * work.unit)
