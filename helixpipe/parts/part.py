"""Parts of the model, the values that flow between them, and the chain that they form.

    x --+-- norm -- n -- qkv -- q,k,v -- attn -- o --+
        +------------------------------------------ proj -- y -- mlp -- x'

`embed` precedes layer 0 and makes its x; `head` follows the last layer and makes the loss. A layer that
cannot be split is one part, `block`, from x to x'.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from helixpipe.errors import ScheduleError
from helixpipe.parts.kind import KINDS, Kind

LAYER_KINDS = ("norm", "qkv", "attn", "proj", "mlp")
FIRST, LAST, OPAQUE = "embed", "head", "block"
AROUND_ATTENTION = {"none": ("attn", "proj"), "qkv": ("qkv", "proj"), "attention": ("norm", "mlp")}
"""What of a layer may travel with its attention -> the kind that opens it, the kind that opens what follows it."""


class Value(NamedTuple):
    """A tensor that flows between parts: `x`, `n`, `q`, `k`, `v`, `o`, `y` of a layer, or the `loss`.

    `x` of layer l is that layer's input, so `x` of layer L is what the head reads.
    """

    name: str
    layer: int

    def __str__(self) -> str:
        return f"{self.name}.{self.layer}"


class Part(NamedTuple):
    """The smallest piece of the model that can be placed: a kind and the layer it stands in.

    `embed` stands in layer 0 and `head` in layer L. Text: `norm.3`, `embed`, `head.32`.
    """

    kind: str
    layer: int

    def __str__(self) -> str:
        return self.kind if self.kind == FIRST else f"{self.kind}.{self.layer}"

    @property
    def about(self) -> Kind:
        """What its kind is, in every model. What depends on a model, `ModelShape.about` says."""
        return KINDS[self.kind]

    @property
    def reads(self) -> tuple[Value, ...]:
        """The values it takes from other parts."""
        return _values(self.about.reads, self.layer)

    @property
    def makes(self) -> tuple[Value, ...]:
        """The values it gives to other parts."""
        kind = self.about
        return _values(kind.makes, self.layer + kind.ends_layer)

    @staticmethod
    def parse(text: str) -> Part:
        """The part that `str(part)` wrote; raises ScheduleError."""
        match = re.fullmatch(r"([a-z]+)(?:\.([0-9]{1,9}))?", text)
        if not match or match[1] not in KINDS or (match[2] is None) != (match[1] == FIRST):
            raise ScheduleError(f"'{text}' is not a part; write one as 'embed', 'norm.3' or 'head.32'")
        return Part(match[1], int(match[2] or 0))


@cache
def _values(names: tuple[str, ...], layer: int) -> tuple[Value, ...]:
    """Made once: a prediction asks for them a million times."""
    return tuple(Value(name, layer) for name in names)


def layer_parts(layer: int, opaque: bool = False) -> tuple[Part, ...]:
    """The parts of one layer: five, or one when the layer is opaque."""
    return tuple(Part(kind, layer) for kind in ((OPAQUE,) if opaque else LAYER_KINDS))


def attention_part(layer: int) -> Part:
    """The part of a layer that attends."""
    return next(part for part in layer_parts(layer) if part.about.attends)


def ends(layers: int) -> tuple[Part, Part]:
    """What precedes the first layer, and what follows the last."""
    return Part(FIRST, 0), Part(LAST, layers)


def chain(layers: int, opaque: Collection[int] = ()) -> tuple[Part, ...]:
    """All parts of a model in order: embed, every layer's, head."""
    first, last = ends(layers)
    middle = [part for layer in range(layers) for part in layer_parts(layer, layer in opaque)]
    return (first, *middle, last)


def loss_of(layers: int) -> Value:
    """What the head makes."""
    return Part(LAST, layers).makes[0]
