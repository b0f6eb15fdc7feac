"""head: final norm, logits and cross entropy, x of layer L to the loss. It may run in slices."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.norm import norm_backward, norm_parameters, norm_saved
from helixpipe.parts.part import FIRST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping, Work

IGNORED = -100
"""A target that counts for nothing, as in torch's cross entropy."""


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
        return norm_parameters(shape, "norm.") | linear("output", shape.vocabulary, shape.hidden, False)

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        if name == "output.weight" and shape.tied:
            return f"{FIRST}.tokens.weight"
        return f"head.{name}"

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        """The loss, summed over tokens."""
        return ()

    def chunk(self, keeping: Keeping) -> int:
        return keeping.head_chunk

    def moved_elements(self, shape: ModelShape) -> float:
        return 2.0 * shape.hidden + 4.0 * shape.vocabulary

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
        inner = {
            f"{part}.normed": work.tokens * work.shape.hidden * work.keeping.element_bytes,
            f"{part}.logits": work.tokens * work.shape.vocabulary * work.keeping.wide_bytes,
        }
        return reads | norm_saved(work, f"{part}.norm") | inner

    def linears(self, part: Part, work: Work) -> dict[str, tuple[int, int]]:
        return {f"{part}.normed": (work.shape.vocabulary, work.shape.hidden)}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """Logits beside their log-softmax, which a graph keeps."""
        if work.slices(part):
            return self.forward_workspace(part, work.sliced(part), graph=False)
        narrow = 0 if work.is_wide else work.unit
        return work.shape.vocabulary * (work.wide_unit * (1 if graph else 2) + narrow)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The gradients of the log-softmax and of the logits."""
        if work.slices(part):
            piece = work.sliced(part)
            graph = sum(self.saved(part, piece).values())
            return work.value_bytes(part.reads[0]) + graph + self.backward_workspace(part, piece)
        both = 2 * work.shape.vocabulary * work.wide_unit
        after = work.shape.vocabulary * work.unit + work.shape.hidden * work.unit + self.largest_matrix(work)
        return max(both, after, norm_backward(work) + work.shape.hidden * work.unit)
