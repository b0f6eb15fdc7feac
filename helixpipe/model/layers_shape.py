"""LayersShape: what is said of a model made of somebody's modules. All of it comes from the modules themselves."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from helixpipe.errors import ConfigError
from helixpipe.model.trial import Figures, Given, Trials
from helixpipe.parts.block import BlockKind
from helixpipe.parts.embed import EmbedKind
from helixpipe.parts.head import HeadKind
from helixpipe.parts.kind import Kept, Kind, Shapes
from helixpipe.parts.part import Part, Value
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work


@dataclass(frozen=True, eq=False)
class LayersShape(ModelShape):
    """Of the fields of a decoder, `layers` and `hidden` (elements of x a token) say something here."""

    pieces: tuple[nn.Module, ...] = ()
    """In the order of the chain; called with what `given` says."""
    names: tuple[str, ...] = ()
    """Of the pieces, in front of those of their parameters."""
    told: tuple[str, ...] = ()
    """The same, for errors."""
    length: int = 16
    """Tokens of a sequence that the pieces are known to take."""

    def __post_init__(self) -> None:
        """Try all pieces. Raises ConfigError for one that fails, or whose loss is no scalar."""
        _ = self.full_names
        work = Work(self, self.example())
        x = self.values(work.lead)[-1]
        object.__setattr__(self, "hidden", math.prod(x) // math.prod(work.lead))
        loss = self.figures(self.chain()[-1], work).made
        if loss:
            raise ConfigError(
                f"{self.told[-1]} gave {list(loss)} as the loss; give a scalar, the sum over tokens (reduction='sum')"
            )

    @staticmethod
    def of(pieces: Sequence[nn.Module], names: Sequence[str], told: Sequence[str], length: int) -> LayersShape:
        return LayersShape(
            layers=len(pieces) - 2, hidden=0, heads=1, ffn=0, vocabulary=0, norm="own", positions="own", mlp="own",
            pieces=tuple(pieces), names=tuple(names), told=tuple(told), length=length,
        )  # fmt: skip

    @property
    def opaque(self) -> tuple[int, ...]:
        return tuple(range(self.layers))

    def example(self, segments: int = 1, sequences: int = 1) -> Batch:
        return Batch(sequences, (self.length,) * segments)

    def place(self, part: Part) -> int:
        """In the chain. Raises ConfigError for a part that is not in it."""
        if part not in self._places:
            raise ConfigError(
                f"{part}: a model of hp.Layers has no such part, since its layers are one block each; make its schedule with "
                "hp.build_schedule(..., model=model)"
            )
        return self._places[part]

    def about(self, part: Part) -> Kind:
        return self._kinds[self.place(part)]

    def alike(self, part: Part) -> Hashable:
        """The same class, settings and parameter shapes, and the same x."""
        place = self.place(part)
        return self._groups[place], self.given(part, Work(self, self.example()))

    def value_shape(self, value: Value, batch: Batch, segment: int) -> tuple[int, ...]:
        lead = Work(self, batch, segment).lead
        return self.values(lead)[value.layer] if value.name == "x" else ()

    def check_sharing(self, context: int, tensor: int) -> None:
        for axis, ranks in (("cp", context), ("tp", tensor)):
            if ranks > 1:
                raise ConfigError(
                    f"mesh.{axis}: {ranks}; the modules of hp.Layers cannot be shared by ranks: use {axis} 1, and dp in its place"
                )

    def tensor_share(self, ranks: int) -> ModelShape:
        self.check_sharing(1, ranks)
        return self

    def values(self, lead: tuple[int, int]) -> list[tuple[int, ...]]:
        """The shape of each x, from tokens [b, s]."""
        if lead not in self._values:
            found: list[tuple[int, ...]] = []
            for place in range(self.layers + 1):
                given = (Given(found[-1], True),) if place else (Given(lead, False),)
                found.append(self._trials.figures(self._groups[place], given, Keeping().element_bytes).made)
            self._values[lead] = found
        return self._values[lead]

    def given(self, part: Part, work: Work) -> tuple[Given, ...]:
        """What a piece is called with."""
        place, tokens = self.place(part), Given(work.lead, False)
        if place == 0:
            return (tokens,)
        x = Given(self.values(work.lead)[place - 1], True)
        return (x, tokens) if place == len(self.pieces) - 1 else (x,)

    def figures(self, part: Part, work: Work) -> Figures:
        """What a part makes, costs and keeps."""
        place = self.place(part)
        return self._trials.figures(self._groups[place], self.given(part, work), work.keeping.element_bytes)

    @cached_property
    def full_names(self) -> list[dict[str, str]]:
        """Of each piece, name within it -> the parameter's own. Raises ConfigError for two parameters of one name."""
        known: dict[int, str] = {}
        found: list[dict[str, str]] = []
        for piece, name in zip(self.pieces, self.names, strict=True):
            mine = {}
            for local, parameter in piece.named_parameters(remove_duplicate=False):
                mine[local] = known.setdefault(id(parameter), f"{name}.{local.removeprefix('module.')}")
            found.append(mine)
        names = list(known.values())
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ConfigError(f"{twice}: two parameters have this name; rename one in its module")
        return found

    @cached_property
    def _places(self) -> dict[Part, int]:
        return {part: place for place, part in enumerate(self.chain())}

    @cached_property
    def _kinds(self) -> list[Kind]:
        makers = [_OwnEmbed, *[_OwnBlock] * self.layers, _OwnHead]
        return [make(piece) for make, piece in zip(makers, self.pieces, strict=True)]

    @cached_property
    def _groups(self) -> list[int]:
        """Of each piece, the first that is like it."""
        likes = [_like(piece) for piece in self.pieces]
        return [likes.index(like) for like in likes]

    @cached_property
    def _trials(self) -> Trials:
        return Trials(self.pieces, self.told)

    @cached_property
    def _values(self) -> dict[tuple[int, int], list[tuple[int, ...]]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be found out again."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


class _Own(Kind):
    """A part that is one module: what is said of it is what its trial showed."""

    def __init__(self, piece: nn.Module) -> None:
        self.piece = piece

    def parameters(self, shape: ModelShape) -> Shapes:
        return {name: tuple(parameter.shape) for name, parameter in self.piece.named_parameters()}

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return _layers(shape).full_names[_layers(shape).place(part)][name]

    def chunk(self, keeping: Keeping) -> int:
        return 0

    def inside(self, part: Part) -> tuple[Part, ...]:
        return (part,)

    def forward_flops(self, part: Part, work: Work) -> float:
        return _tried(part, work).forward_flops

    def backward_flops(self, part: Part, work: Work) -> float:
        return _tried(part, work).backward_flops

    def weight_flops(self, part: Part, work: Work) -> float:
        """A foreign module's whole backward is its I."""
        return 0.0

    def moved(self, part: Part, work: Work) -> float:
        return _tried(part, work).moved_elements

    @property
    def exchanges(self) -> int:
        return 0

    @property
    def vocabulary_exchanges(self) -> int:
        return 0

    def saved(self, part: Part, work: Work) -> Kept:
        figures = _tried(part, work)
        found = work.values(part.reads) if figures.saves_input else {}
        found |= work.values(part.makes) if figures.saves_output else {}
        return found | ({f"{part}.inside": figures.inside_bytes} if figures.inside_bytes else {})

    def put_off(self, part: Part, work: Work) -> Kept:
        return {}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        figures = _tried(part, work)
        return figures.graph_workspace if graph else figures.plain_workspace

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        return _tried(part, work).backward_workspace


class _OwnEmbed(_Own, EmbedKind):
    pass


class _OwnBlock(_Own, BlockKind):
    pass


class _OwnHead(_Own, HeadKind):
    pass


def _layers(shape: ModelShape) -> LayersShape:
    assert isinstance(shape, LayersShape)
    return shape


def _tried(part: Part, work: Work) -> Figures:
    return _layers(work.shape).figures(part, work)


def _like(piece: nn.Module) -> Hashable:
    """Classes, plain settings, and shapes of parameters and buffers: what is alike in these costs the same."""
    plain = (bool, int, float, str, type(None), tuple, FunctionType, BuiltinFunctionType)
    inside = tuple(
        (name, type(inner), tuple((k, repr(v)) for k, v in sorted(vars(inner).items()) if isinstance(v, plain)))
        for name, inner in piece.named_modules()
    )
    tensors = (*piece.named_parameters(), *piece.named_buffers())
    return inside, tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors)
