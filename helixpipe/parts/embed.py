"""embed: rows of the table, and of learned positions, to x of layer 0."""

from __future__ import annotations

from helixpipe.parts.kind import Kind, Shapes, register
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


@register
class EmbedKind(Kind):
    name = "embed"
    reads = ()
    beside = ("tokens", "start")
    makes = ("x",)
    divides = False

    def parameters(self, shape: ModelShape) -> Shapes:
        rows = {"tokens": shape.vocabulary} | ({"positions": shape.context} if shape.positions == "learned" else {})
        return {f"{name}.weight": (count, shape.hidden) for name, count in rows.items()}

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return f"embed.{name}"

    def forward_flops(self, part: Part, work: Work) -> float:
        return 0.0

    def moved_elements(self, shape: ModelShape) -> float:
        return 2.0 * shape.hidden

    @property
    def vocabulary_exchanges(self) -> int:
        """Each rank looks its own words up: a reduce-scatter of x, and a gather of its gradient."""
        return 1
