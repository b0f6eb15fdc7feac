"""norm: the norm before attention, x to n; and what any norm inside a part keeps."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


def norm_parameters(shape: ModelShape, name: str = "") -> Shapes:
    """Of a norm over the hidden size."""
    names = ("weight", "bias") if shape.norm == "layer" else ("weight",)
    return {f"{name}{each}": (shape.hidden,) for each in names}


def norm_saved(work: Work, name: str, size: int = 0, rows: int = 1) -> Kept:
    """Beside its input: `rows` of a token together have `size` elements (0: hidden); each has its statistics."""
    tokens, wide, size = work.tokens, work.keeping.wide_bytes, size or work.shape.hidden
    if work.shape.norm == "rms" and not work.keeping.fused_rms:
        inner = {f"{name}.scaled": tokens * size * wide, f"{name}.scale": tokens * rows * wide}
        widened = {f"{name}.widened": tokens * size * wide} if wide > work.keeping.element_bytes else {}
        return inner | widened
    return {f"{name}.statistics": tokens * rows * wide * (1 if work.shape.norm == "rms" else 2)}


@register
class NormKind(Kind):
    name = "norm"
    reads = ("x",)
    makes = ("n",)

    def parameters(self, shape: ModelShape) -> Shapes:
        return norm_parameters(shape)

    def moved_elements(self, shape: ModelShape) -> float:
        return 2.0 * shape.hidden

    def saved(self, part: Part, work: Work) -> Kept:
        return work.values(part.reads) | norm_saved(work, str(part))
