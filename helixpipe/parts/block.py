"""block: a whole layer as one part, x to the next layer's x. It costs and keeps what the parts of a layer do."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.lifetimes import lifetimes
from helixpipe.parts.part import LAYER_KINDS, Part, layer_parts
from helixpipe.parts.shape import ModelShape, handed_on
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
    like = 1
    """A layer that has the parts of this one, in every model."""

    def of(self, part: Part, shape: ModelShape) -> Kind:
        return _FIRST if part.layer == 0 else self

    def inside(self, part: Part) -> tuple[Part, ...]:
        return tuple(Part(kind, part.layer) for kind in LAYER_KINDS)

    def parameters(self, shape: ModelShape) -> Shapes:
        parts = [Part(kind, self.like) for kind in LAYER_KINDS]
        return {f"{part.kind}.{name}": size for part in parts for name, size in shape.parameters(part).items()}

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return f"layers.{part.layer}.{name}"

    def forward_flops(self, part: Part, work: Work) -> float:
        return sum(work.shape.about(inner).forward_flops(inner, work) for inner in self.inside(part))

    def backward_flops(self, part: Part, work: Work) -> float:
        return sum(work.shape.about(inner).backward_flops(inner, work) for inner in self.inside(part))

    def weight_flops(self, part: Part, work: Work) -> float:
        return sum(work.shape.about(inner).weight_flops(inner, work) for inner in self.inside(part))

    def moved_elements(self, shape: ModelShape) -> float:
        parts = [Part(kind, self.like) for kind in LAYER_KINDS]
        return sum(shape.about(part).moved_elements(shape) for part in parts)

    @property
    def exchanges(self) -> int:
        return sum(Part(kind, self.like).about.exchanges for kind in LAYER_KINDS)

    def saved(self, part: Part, work: Work) -> Kept:
        return {name: size for inner in self.inside(part) for name, size in _saved(inner, work).items()}

    def put_off(self, part: Part, work: Work) -> Kept:
        return {name: size for inner in self.inside(part) for name, size in work.put_off(inner).items()}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """At its widest part: what that needs, and the values that live inside beside the layer's own."""
        parts = self.inside(part)
        alive: Kept = work.values(part.reads)
        saved: Kept = {}
        most = 0
        for inner, drops in zip(parts, lifetimes(parts, part.reads, part.makes).drops, strict=True):
            if not work.shape.about(inner).hands_on:
                alive |= work.values(inner.makes)
            saved |= _saved(inner, work) if graph else {}
            here = sum((alive | saved).values()) + work.forward_workspace(inner, graph)
            most = max(most, here)
            for value in drops:
                if value not in part.makes:
                    alive.pop(str(value), None)
        return max(0, most - sum((alive | saved).values()))

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """What is saved goes part by part, while gradients come."""
        parts = self.inside(part)
        pending = lifetimes(parts, part.makes, part.makes).pending
        saved = [_saved(inner, work) for inner in parts]
        whole = sum(self.saved(part, work).values()) + sum(work.values(part.makes).values())
        most = 0
        for i, inner in enumerate(parts):
            left = {name: size for each in saved[: i + 1] for name, size in each.items()}
            held = sum(left.values()) + sum(work.values(pending[i]).values())
            most = max(most, held + work.backward_workspace(inner, unread=False) - whole)
        return most


class FirstBlockKind(BlockKind):
    """Layer 0, which may have a norm less."""

    like = 0


def _saved(inner: Part, work: Work) -> Kept:
    """What a part inside saves, by names of tensors: what a norm hands on is what it reads."""
    same = handed_on(layer_parts(inner.layer), work.shape)
    return {same.get(name, name): size for name, size in work.saved(inner).items()}


_FIRST = FirstBlockKind()
