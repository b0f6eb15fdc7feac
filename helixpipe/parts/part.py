"""Parts of the model, the values that flow between them, and the chain that they form.

    x --+-- norm -- n -- qkv -- q,k,v -- attn -- o --+
        +------------------------------------------ proj -- y -- mlp -- x'

`embed` precedes layer 0 and makes its x; `head` follows the last layer and makes the loss. A layer that
cannot be split is one part, `block`, from x to x'. Where the vocabulary is spread, shards take the places of these two:

    lookup.i (tokens) -- e.i --> joined -- x of layer 0        x of layer L --> final -- f --> logits.i -- scores.i --> loss
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import NamedTuple

from helixpipe.errors import ScheduleError
from helixpipe.parts.kind import KINDS, Kind

LAYER_KINDS = ("norm", "qkv", "attn", "proj", "mlp")
FIRST, LAST, OPAQUE = "embed", "head", "block"
FIRST_SHARDS, LAST_SHARDS = ("lookup", "joined"), ("final", "logits", "loss")
"""What stands in the place of the first part, and of the last, where the vocabulary is spread."""
AROUND_ATTENTION = {"none": ("attn", "proj"), "qkv": ("qkv", "proj"), "attention": ("norm", "mlp")}
"""What of a layer may travel with its attention -> the kind that opens it, the kind that opens what follows it."""


class Value(NamedTuple):
    """A tensor that flows between parts: `x`, `n`, `q`, `k`, `v`, `o`, `y` of a layer, or the `loss`.

    `x` of layer l is that layer's input, so `x` of layer L is what the head reads. What a shard makes is its own: `scores.32.3/8`.
    """

    name: str
    layer: int
    shard: int = 0
    shards: int = 1

    def __str__(self) -> str:
        return f"{self.name}.{self.layer}" + (f".{self.shard}/{self.shards}" if self.shards > 1 else "")


class Part(NamedTuple):
    """The smallest piece of the model that can be placed: a kind and the layer it stands in.

    `embed` stands in layer 0 and `head` in layer L. Text: `norm.3`, `embed`, `head.32`. A kind may have shards, slices of one
    weight: `logits.32.3/8` is the fourth of eight. What joins their values counts them: `loss.32/8`, shard 0 of 8.
    """

    kind: str
    layer: int
    shard: int = 0
    shards: int = 1

    def __str__(self) -> str:
        if self.kind == FIRST:
            return self.kind
        found = f"{self.kind}.{self.layer}"
        if self.shards > 1:
            found += f".{self.shard}/{self.shards}" if self.about.sharded else f"/{self.shards}"
        return found

    @property
    def about(self) -> Kind:
        """What its kind is, in every model. What depends on a model, `ModelShape.about` says."""
        return KINDS[self.kind]

    @property
    def reads(self) -> tuple[Value, ...]:
        """The values it takes from other parts."""
        return _read_by(self)

    @property
    def makes(self) -> tuple[Value, ...]:
        """The values it gives to other parts."""
        return _made_by(self)

    @staticmethod
    def parse(text: str) -> Part:
        """The part that `str(part)` wrote; raises ScheduleError."""
        match = re.fullmatch(r"([a-z]+)(?:\.([0-9]{1,9}))?(?:\.([0-9]{1,5}))?(?:/([0-9]{1,5}))?", text)
        if match and match[1] in KINDS and (match[2] is None) == (match[1] == FIRST):
            part = Part(match[1], int(match[2] or 0), int(match[3] or 0), int(match[4] or 1))
            says = match[3] is not None, match[4] is not None
            whole, kind = not any(says), part.about
            if whole or (part.shard < part.shards > 1 and says == (kind.sharded, kind.sharded or kind.joins)):
                return part
        raise ScheduleError(f"'{text}' is not a part; write one as 'embed', 'norm.3' or 'head.32'")


@cache
def _read_by(part: Part) -> tuple[Value, ...]:
    """Made once: a prediction asks for them a million times."""
    kind = part.about
    if not kind.joins:
        return tuple(Value(name, part.layer) for name in kind.reads)
    return tuple(Value(name, part.layer, shard, part.shards) for name in kind.reads for shard in range(part.shards))


@cache
def _made_by(part: Part) -> tuple[Value, ...]:
    kind = part.about
    which = part[2:] if kind.sharded else (0, 1)
    return tuple(Value(name, part.layer + kind.ends_layer, *which) for name in kind.makes)


def layer_parts(layer: int, opaque: bool = False) -> tuple[Part, ...]:
    """The parts of one layer: five, or one when the layer is opaque."""
    return tuple(Part(kind, layer) for kind in ((OPAQUE,) if opaque else LAYER_KINDS))


def attention_part(layer: int) -> Part:
    """The part of a layer that attends."""
    return next(part for part in layer_parts(layer) if part.about.attends)


def ends(layers: int) -> tuple[Part, Part]:
    """What precedes the first layer, and what follows the last."""
    return Part(FIRST, 0), Part(LAST, layers)


def chain(layers: int, opaque: Collection[int] = (), vocabulary_shards: int = 0) -> tuple[Part, ...]:
    """All parts of a model in order: embed, every layer's, head; or with as many shards of the vocabulary in their places."""
    middle = [part for layer in range(layers) for part in layer_parts(layer, layer in opaque)]
    if not vocabulary_shards:
        first, last = ends(layers)
        return (first, *middle, last)
    before = (part for kind in FIRST_SHARDS for part in _of_shards(kind, 0, vocabulary_shards))
    after = (part for kind in LAST_SHARDS for part in _of_shards(kind, layers, vocabulary_shards))
    return (*before, *middle, *after)


def _of_shards(kind: str, layer: int, shards: int) -> tuple[Part, ...]:
    """All parts of a kind where the vocabulary has so many shards."""
    if KINDS[kind].sharded:
        return tuple(Part(kind, layer, shard, shards) for shard in range(shards))
    return (Part(kind, layer, 0, shards if KINDS[kind].joins else 1),)


def vocabulary_shards(parts: Iterable[Part]) -> int:
    """How many shards of the vocabulary these parts of a model have; 0 where head and embedding are whole."""
    return next((part.shards for part in parts if part.about.sharded), 0)


def loss_of(layers: int) -> Value:
    """What the head makes, and what joins its shards."""
    return Part(LAST, layers).makes[0]
