"""Modules: the parts of a model on this rank, and what all ranks agree on before any of them runs.

A part's module may be anybody's: its parameters may be frozen, stand at several places, or be in no shape's list.

    rank 0   what is trained, what is wrong ──┐
    rank 1   what is trained, what is wrong ──┼──► on every rank an error, or one shape that knows what is frozen
    rank 2   ...                            ──┘

What would not be exact is refused here, by name: ranks derive messages from the shape, and never ask each other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from helixpipe.errors import ConfigError
from helixpipe.model.attn import Attention
from helixpipe.model.decoder import Held, Holding, Model
from helixpipe.model.kernels import check_head_dim
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import whole_name
from helixpipe.runtime.calls import call_fault, documents_fault
from helixpipe.runtime.tensor import TensorParallel
from helixpipe.schedule.program import parameter_owners, visits
from helixpipe.schedule.schedule import Schedule


class Named(NamedTuple):
    """A parameter of a part: its full name, whether this rank owns it, and every place in the module where it stands."""

    name: str
    parameter: nn.Parameter
    owned: bool
    places: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What a rank tells all others."""

    faults: tuple[str, ...]
    trains: tuple[tuple[str, bool], ...]
    """Full name of a parameter and whether it is trained, for every part that has it."""
    buffers: tuple[tuple[Part, tuple[str, ...]], ...]
    """What buffers a part has."""
    of_one_document: tuple[str, ...] = ()
    """Why sequences cannot hold several."""


def alone(mine: Told) -> Sequence[Told]:
    """The exchange of a rank that has no others."""
    return [mine]


class Modules:
    """Asks the model for the parts that this rank owns or runs, and for no others. Collective, by `exchange`."""

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        tensor: TensorParallel | None = None,
        exchange: Callable[[Told], Sequence[Told]] = alone,
    ) -> None:
        """`tensor`: of each part, this rank holds and computes its share. Raises ConfigError, on all ranks together."""
        self.schedule, self.rank, self.device, self.dtype = schedule, rank, device, dtype
        self.shape = model.shape if tensor is None else tensor.local
        self.running: dict[Part, nn.Module] = {}
        self.owned: dict[Part, nn.Module] = {}
        self.parameters: dict[Part, list[Named]] = {}
        self.aliases: dict[str, str] = {}
        """Full name of a parameter that the shape lists twice -> the one that it has here."""
        self.travelling = frozenset(name for visit in visits(schedule, self.shape) for name in visit.parameters)
        self._owners = parameter_owners(schedule, self.shape)
        self._have: set[str] = set()  # parameters of parts taken in before: of another with the same, sizes are enough
        faults: list[str] = []
        for stage in range(len(schedule.stages)):
            if rank in self.ranks_with(stage):
                for part in schedule.stages[stage].parts:
                    try:
                        faults += self._take(model, tensor, stage, part)
                        self._have.update(named.name for named in self.parameters[part])
                    except ConfigError as error:
                        faults.append(str(error))
        faults += self._clashes()
        trains = [
            (name, parameter.requires_grad and self.shape.trains(name))
            for named in self.parameters.values()
            for name, parameter, *_ in named
        ]
        buffers = [
            (part, tuple(f"{place} {list(buffer.shape)}" for place, buffer in module.named_buffers()))
            for part, module in {**self.owned, **self.running}.items()
        ]
        here = {**self.owned, **self.running}
        of_one_document = (documents_fault(part, module) for part, module in here.items())
        mine = Told(tuple(faults), tuple(trains), tuple(buffers), tuple(filter(None, of_one_document)))
        everyone = exchange(mine)
        self.shape = _agreed(mine, everyone, self.shape)
        self.of_one_document = next((fault for told in everyone for fault in told.of_one_document), "")
        """Why the model's sequences cannot hold several documents; "" where they can."""
        self.with_buffers = frozenset(part for told in everyone for part, buffers in told.buffers if buffers)

    def ranks_with(self, stage: int) -> list[int]:
        """Those that have a stage's modules: its owner first."""
        owner = self.schedule.owner(stage)
        return [owner, *(rank for rank in self.schedule.ranks_of[stage] if rank != owner)]

    def _asked(self, model: Model, tensor: TensorParallel | None, stage: int, part: Part) -> nn.Module:
        """A part's module, with no more of its parameters than this rank holds where the model can do so."""
        if not isinstance(model, Holding):
            return model.part(part)
        owner = self.schedule.owner(stage)

        def owns(name: str) -> bool:
            return self._owners.get(name, owner) == self.rank and name not in self._have

        return model.part_for(part, Held(self.shape, tensor.rank if tensor else 0, owns))

    def _take(self, model: Model, tensor: TensorParallel | None, stage: int, part: Part) -> Iterator[str]:
        """Take a part's module in; what is wrong with it."""
        module = self._asked(model, tensor, stage, part)
        if any(isinstance(inner, Attention) for inner in module.modules()):
            check_head_dim(self.shape.head_dim, self.device, self.dtype)
        if tensor is not None:
            tensor.divide(part, module)
        module = module.to(self.device)
        if fault := call_fault(part, module):
            yield fault
        if self.rank in self.schedule.ranks_of[stage]:
            self.running[part] = module
        if self.rank == self.schedule.owner(stage):
            self.owned[part] = module
        self.parameters[part] = []
        at = dict(module.named_parameters(remove_duplicate=False))
        listed, whose = self.shape.parameters(part), f"{type(module).__name__} of {part}"
        for place, size in listed.items():
            name = self.shape.parameter_name(part, place)
            if place in at and at[place].shape != size:
                yield f"{name}: {list(at[place].shape)} in {whose}, and model.shape says {list(size)}; make them the same"
            elif place not in at and name in self.travelling:
                yield (
                    f"{name}: model.shape lists it and its weights travel, and {whose} has no parameter {place}; "
                    "leave it out of shape.parameters"
                )
        places_of: dict[int, list[str]] = {}
        for place, parameter in at.items():
            places_of.setdefault(id(parameter), []).append(place)
        for places in places_of.values():
            yield from self._name(stage, part, whose, at[places[0]], places, [p for p in places if p in listed])

    def _name(
        self, stage: int, part: Part, whose: str, parameter: nn.Parameter, places: list[str], listed: list[str]
    ) -> Iterator[str]:
        """Take one parameter in; what is wrong with it. `listed`: its places that the shape knows."""
        names = [self.shape.parameter_name(part, place) for place in listed or places[:1]]
        name = names[0]
        self.aliases.update((other, name) for other in names[1:] if other != name)
        owners = {self._owners.get(each, self.schedule.owner(stage)) for each in names}
        if len(owners) > 1:
            yield f"{' and '.join(names)} are one parameter of {whose}, and two ranks own them; list it once"
        self.parameters[part].append(Named(name, parameter, self.rank in owners, tuple(places)))
        ranks = self.schedule.ranks_of[stage]
        if not listed and owners != set(ranks):
            yield (
                f"{name}: a parameter of {whose} that model.shape does not list, and ranks "
                f"{', '.join(map(str, sorted(owners | set(ranks))))} need it: it would not travel; list it in "
                "shape.parameters, or keep the part on one rank"
            )
        if self.rank in owners and name not in self._have and parameter.numel() > 1 and not any(parameter.stride()):
            yield f"{name}: its values in {whose} are with an earlier pipeline; hand out a new module"
        if not parameter.is_floating_point() and (parameter.requires_grad or name in self.travelling):
            kind, cannot = str(parameter.dtype).removeprefix("torch."), "train" if parameter.requires_grad else "travel"
            yield f"{name}: {kind} in {whose} cannot {cannot}; use floating point, or a buffer"

    def _clashes(self) -> Iterator[str]:
        """What parts of this rank say of each other's parameters."""
        names: dict[int, str] = {}
        sizes: dict[str, tuple[torch.Size, Part]] = {}
        for part, named in self.parameters.items():
            for name, parameter, *_ in named:
                other = names.setdefault(id(parameter), name)
                if other != name:
                    yield (
                        f"{other} and {name} are one parameter, and other ranks cannot know; "
                        "give them one name in shape.parameter_name"
                    )
                size, first = sizes.setdefault(name, (parameter.shape, part))
                if size != parameter.shape:
                    yield f"{name}: {list(size)} in {first} and {list(parameter.shape)} in {part}; give them two names"


def _agreed(mine: Told, everyone: Sequence[Told], shape: ModelShape) -> ModelShape:
    """The shape that knows what any module has frozen. Raises ConfigError where something is wrong on any rank."""
    for told in (mine, *everyone):
        for fault in told.faults:
            raise ConfigError(fault)
    seen: dict[str, bool] = {}  # of slices, what they are slices of
    for told in everyone:
        for name, trains in ((whole_name(name), trains) for name, trains in told.trains):
            if seen.setdefault(name, trains) != trains:
                raise ConfigError(
                    f"{name}: frozen in one part or rank and trained in another; let requires_grad be the same in all"
                )
    has: dict[Part, tuple[str, ...]] = {}
    for part, buffers in (each for told in everyone for each in told.buffers):
        if has.setdefault(part, buffers) != buffers:
            (differs, *_) = sorted(set(has[part]) ^ set(buffers)) or [", ".join(buffers)]
            raise ConfigError(f"{part}: not all ranks have its buffer {differs}; hand out the same module whoever asks")
    for pattern in shape.frozen:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in seen):
            raise ConfigError(f"model.frozen: '{pattern}' is no parameter; they are {', '.join(sorted(seen)[:3])}, ...")
    frozen = sorted(name for name, trains in seen.items() if not trains and shape.trains(name))
    return shape.freezing(frozen) if frozen else shape
