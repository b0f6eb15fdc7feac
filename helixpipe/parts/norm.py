"""norm: the norm before attention, x to n; and what any norm inside a part keeps."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


def norm_parameters(shape: ModelShape, name: str = "", size: int = 0) -> Shapes:
    """Of a norm over `size` elements (0: the hidden size)."""
    names = ("weight", "bias") if shape.norm == "layer" and shape.norm_bias else ("weight",)
    return {f"{name}{each}": (size or shape.hidden,) for each in names}


def norm_saved(work: Work, name: str, rows: int = 1) -> Kept:
    """Beside its input: one number a row, or a LayerNorm's two; `rows` of them a token."""
    return {f"{name}.statistics": rows * work.wide_unit * (1 if work.shape.norm == "rms" else 2)}


def norm_forward(work: Work, size: int = 0) -> int:
    """Workspace: an RMSNorm is computed in float32 where there is no kernel for it."""
    return (size or work.shape.hidden) * work.wide_unit if _is_composed(work) and not work.is_wide else 0


def norm_backward(work: Work, size: int = 0) -> int:
    """Workspace, the input's gradient included."""
    size = size or work.shape.hidden
    if not _is_composed(work):
        return size * work.unit
    return 2 * size * work.wide_unit + (0 if work.is_wide else size * work.unit)


def _is_composed(work: Work) -> bool:
    """Whether a norm is made of elementwise operations: an RMSNorm without a kernel (see `model.norm`)."""
    return work.shape.norm == "rms" and (work.keeping.device != "cuda" or work.shape.norm_offset)


@register
class NormKind(Kind):
    name = "norm"
    reads = ("x",)
    makes = ("n",)
    cheap = True

    def of(self, part: Part, shape: ModelShape) -> Kind:
        return self if shape.has_norm_before(part.layer) else _NO_NORM

    def parameters(self, shape: ModelShape) -> Shapes:
        return norm_parameters(shape)

    def moved_elements(self, shape: ModelShape) -> float:
        return 2.0 * shape.hidden

    def saved(self, part: Part, work: Work) -> Kept:
        return work.values(part.reads) | norm_saved(work, str(part))

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        return norm_forward(work)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        return norm_backward(work)


class NoNormKind(NormKind):
    """Of a layer without a norm before attention: n is x."""

    hands_on = True
    cheap = False
    has_parameters = False

    def parameters(self, shape: ModelShape) -> Shapes:
        return {}

    def moved_elements(self, shape: ModelShape) -> float:
        return 0.0

    def saved(self, part: Part, work: Work) -> Kept:
        return {}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        return 0

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        return 0


_NO_NORM = NoNormKind()
