"""norm: the norm before attention, x to n; and what any norm inside a part keeps."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


def norm_parameters(shape: ModelShape, name: str = "", size: int = 0) -> Shapes:
    """Of a norm over `size` elements (0: the hidden size)."""
    names = ("weight", "bias") if shape.norm == "layer" else ("weight",)
    return {f"{name}{each}": (size or shape.hidden,) for each in names}


def norm_saved(work: Work, name: str, rows: int = 1) -> Kept:
    """Beside its input: one number a row, or a LayerNorm's two; `rows` of them a token."""
    return {f"{name}.statistics": rows * work.wide_unit * (1 if work.shape.norm == "rms" else 2)}


def norm_forward(work: Work, size: int = 0) -> int:
    """Workspace: an RMSNorm is computed in float32 where there is no kernel for it."""
    widened = work.shape.norm == "rms" and work.keeping.device != "cuda" and not work.is_wide
    return (size or work.shape.hidden) * work.wide_unit if widened else 0


def norm_backward(work: Work, size: int = 0) -> int:
    """Workspace, the input's gradient included."""
    size = size or work.shape.hidden
    if work.shape.norm != "rms" or work.keeping.device == "cuda":
        return size * work.unit
    return 2 * size * work.wide_unit + (0 if work.is_wide else size * work.unit)


@register
class NormKind(Kind):
    name = "norm"
    reads = ("x",)
    makes = ("n",)
    cheap = True

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
