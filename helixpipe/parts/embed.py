"""embed: rows of the table, scaled where a model does so, and of learned positions, to x of layer 0, normed or not."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.norm import norm_backward, norm_forward, norm_parameters, norm_saved
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


def rows_saved(part: Part, work: Work) -> Kept:
    """What the norm behind the rows reads, which is nobody else's."""
    if not work.shape.embed_norm:
        return {}
    return {f"{part}.rows": work.shape.hidden * work.unit} | norm_saved(work, f"{part}.norm")


def rows_workspace(work: Work, graph: bool) -> int:
    """Bytes of that norm's forward; without a graph the rows are among them."""
    if not work.shape.embed_norm:
        return 0
    return norm_forward(work) + (0 if graph else work.shape.hidden * work.unit)


@register
class EmbedKind(Kind):
    name = "embed"
    reads = ()
    beside = ("tokens", "start")
    makes = ("x",)
    divides = False

    def parameters(self, shape: ModelShape) -> Shapes:
        rows = {"tokens": shape.vocabulary} | ({"positions": shape.context} if shape.positions == "learned" else {})
        found: Shapes = {f"{name}.weight": (count, shape.hidden) for name, count in rows.items()}
        return found | (norm_parameters(shape, "norm.") if shape.embed_norm else {})

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return f"embed.{name}"

    def forward_flops(self, part: Part, work: Work) -> float:
        return 0.0

    def moved_elements(self, shape: ModelShape) -> float:
        passes = 1 + (shape.embed_scale != 1) + shape.embed_norm
        return 2.0 * shape.hidden * passes

    @property
    def vocabulary_exchanges(self) -> int:
        """Each rank looks its own words up: a reduce-scatter of x, and a gather of its gradient."""
        return 1

    def saved(self, part: Part, work: Work) -> Kept:
        return rows_saved(part, work)

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        return rows_workspace(work, graph)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The rows' gradient, where it is not that of x, and the table's."""
        h, table = work.shape.hidden * work.unit, self.largest_matrix(work)
        if work.shape.embed_norm:  # what it reads goes before the table's gradient comes
            return max(norm_backward(work), (h if work.shape.embed_scale != 1 else 0) + table)
        return (h if work.shape.embed_scale != 1 else 0) + table
