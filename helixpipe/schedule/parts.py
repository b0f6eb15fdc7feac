"""Parts of the model, the values that flow between them, stages, and the edges between stages.

    x --+-- norm -- n -- qkv -- q,k,v -- attn -- o --+
        +------------------------------------------ proj -- y -- mlp -- x'

`embed` precedes layer 0 and makes its x; `head` follows the last layer and makes the loss. A layer that
cannot be split is one part, `block`, from x to x'.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from helixpipe.errors import ScheduleError

LAYER_KINDS = ("norm", "qkv", "attn", "proj", "mlp")
KINDS = ("embed", *LAYER_KINDS, "block", "head")
PARAMETERLESS = frozenset({"attn"})

# name of a value -> how many layers after the part's own it belongs to
_READS = {
    "embed": (), "norm": ("x",), "qkv": ("n",), "attn": ("q", "k", "v"), "proj": ("o", "x"),
    "mlp": ("y",), "block": ("x",), "head": ("x",),
}  # fmt: skip
_MAKES = {
    "embed": ("x",), "norm": ("n",), "qkv": ("q", "k", "v"), "attn": ("o",), "proj": ("y",),
    "mlp": ("x",), "block": ("x",), "head": ("loss",),
}  # fmt: skip


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
        return self.kind if self.kind == "embed" else f"{self.kind}.{self.layer}"

    @property
    def reads(self) -> tuple[Value, ...]:
        """The values it takes from other parts."""
        return tuple(Value(name, self.layer) for name in _READS[self.kind])

    @property
    def makes(self) -> tuple[Value, ...]:
        """The values it gives to other parts."""
        layer = self.layer + (self.kind in ("mlp", "block"))
        return tuple(Value(name, layer) for name in _MAKES[self.kind])

    @property
    def has_parameters(self) -> bool:
        return self.kind not in PARAMETERLESS

    @staticmethod
    def parse(text: str) -> Part:
        """The part that `str(part)` wrote; raises ScheduleError."""
        match = re.fullmatch(r"([a-z]+)(?:\.([0-9]{1,9}))?", text)
        if not match or match[1] not in KINDS or (match[2] is None) != (match[1] == "embed"):
            raise ScheduleError(f"'{text}' is not a part; write one as 'embed', 'norm.3' or 'head.32'")
        return Part(match[1], int(match[2] or 0))


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous run of parts that always executes as one.

    `home` is the rank that owns the parameters of a stage that several ranks run (a visiting stage);
    None everywhere else, since the one rank that runs a stage owns it.
    """

    parts: tuple[Part, ...]
    home: int | None = None

    def __str__(self) -> str:
        return " ".join(map(str, self.parts))

    @property
    def has_parameters(self) -> bool:
        return any(part.has_parameters for part in self.parts)

    @property
    def reads(self) -> tuple[Value, ...]:
        """Values that come from other stages, in the order in which its parts read them."""
        made = {value for part in self.parts for value in part.makes}
        seen = dict.fromkeys(value for part in self.parts for value in part.reads)
        return tuple(value for value in seen if value not in made)


class Edge(NamedTuple):
    """Values that one stage makes and another reads. On two ranks it becomes a message, else nothing."""

    producer: int
    consumer: int
    values: tuple[Value, ...]


def layer_parts(layer: int, opaque: bool = False) -> tuple[Part, ...]:
    """The parts of one layer: five, or one `block` when the layer is opaque."""
    return tuple(Part(kind, layer) for kind in (("block",) if opaque else LAYER_KINDS))


def chain(layers: int, opaque: Collection[int] = ()) -> tuple[Part, ...]:
    """All parts of a model in order: embed, every layer's, head."""
    middle = [part for layer in range(layers) for part in layer_parts(layer, layer in opaque)]
    return (Part("embed", 0), *middle, Part("head", layers))


def edges(stages: Sequence[Stage]) -> tuple[Edge, ...]:
    """Every edge between stages, by producer then consumer; what to send is derived from these."""
    made_by = {value: s for s, stage in enumerate(stages) for part in stage.parts for value in part.makes}
    found: dict[tuple[int, int], list[Value]] = {}
    for consumer, stage in enumerate(stages):
        for value in stage.reads:
            found.setdefault((made_by[value], consumer), []).append(value)
    return tuple(Edge(producer, consumer, tuple(found[producer, consumer])) for producer, consumer in sorted(found))


def cut(parts: Iterable[Part], before: Collection[Part]) -> list[tuple[Part, ...]]:
    """The run of parts cut in front of each part of `before`."""
    pieces: list[list[Part]] = [[]]
    for part in parts:
        if part in before and pieces[-1]:
            pieces.append([])
        pieces[-1].append(part)
    return [tuple(piece) for piece in pieces]
