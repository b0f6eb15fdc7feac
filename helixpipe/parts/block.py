"""block: a whole layer as one part, x to the next layer's x. It costs and keeps what the parts of a layer do."""

from __future__ import annotations

from helixpipe.parts.kind import KINDS, Kept, Kind, Shapes, register
from helixpipe.parts.lifetimes import lifetimes
from helixpipe.parts.part import LAYER_KINDS, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


@register
class BlockKind(Kind):
    name = "block"
    reads = ("x",)
    beside = ("start",)
    makes = ("x",)
    ends_layer = True
    opaque = True
    units = 6

    def inside(self, part: Part) -> tuple[Part, ...]:
        return tuple(Part(kind, part.layer) for kind in LAYER_KINDS)

    def parameters(self, shape: ModelShape) -> Shapes:
        return {f"{kind}.{name}": size for kind in LAYER_KINDS for name, size in KINDS[kind].parameters(shape).items()}

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return f"layers.{part.layer}.{name}"

    def forward_flops(self, part: Part, work: Work) -> float:
        return sum(inner.about.forward_flops(inner, work) for inner in self.inside(part))

    def backward_flops(self, part: Part, work: Work) -> float:
        return sum(inner.about.backward_flops(inner, work) for inner in self.inside(part))

    def weight_flops(self, part: Part, work: Work) -> float:
        return sum(inner.about.weight_flops(inner, work) for inner in self.inside(part))

    def moved_elements(self, shape: ModelShape) -> float:
        return sum(KINDS[kind].moved_elements(shape) for kind in LAYER_KINDS)

    @property
    def exchanges(self) -> int:
        return sum(KINDS[kind].exchanges for kind in LAYER_KINDS)

    def saved(self, part: Part, work: Work) -> Kept:
        return {name: size for inner in self.inside(part) for name, size in inner.about.saved(inner, work).items()}

    def put_off(self, part: Part, work: Work) -> Kept:
        return {name: size for inner in self.inside(part) for name, size in inner.about.put_off(inner, work).items()}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """At its widest part: what that needs, and the values that live inside beside the layer's own."""
        parts = self.inside(part)
        alive: Kept = work.values(part.reads)
        saved: Kept = {}
        most = 0
        for inner, drops in zip(parts, lifetimes(parts, part.reads, part.makes).drops, strict=True):
            alive |= work.values(inner.makes)
            saved |= inner.about.saved(inner, work) if graph else {}
            here = sum((alive | saved).values()) + inner.about.forward_workspace(inner, work, graph)
            most = max(most, here)
            for value in drops:
                if value not in part.makes:
                    alive.pop(str(value), None)
        return max(0, most - sum((alive | saved).values()))

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """What is saved goes part by part, while gradients come."""
        parts = self.inside(part)
        pending = lifetimes(parts, part.makes, part.makes).pending
        saved = [inner.about.saved(inner, work) for inner in parts]
        whole = sum(self.saved(part, work).values()) + sum(work.values(part.makes).values())
        most = 0
        for i, inner in enumerate(parts):
            left = {name: size for each in saved[: i + 1] for name, size in each.items()}
            held = sum(left.values()) + sum(work.values(pending[i]).values())
            most = max(most, held + inner.about.backward_workspace(inner, work) - whole)
        return most
