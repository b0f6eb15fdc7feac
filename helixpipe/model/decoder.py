"""Decoder: a model described by a ModelShape, handed out part by part.

A model is anything with a `shape` and a `part` (see `Model`). Ranks ask only for the parts they run, so
no rank ever holds a whole model.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from helixpipe.model import attn, block, embed, final, head, joined, logits, lookup, loss, mlp, norm, proj, qkv
from helixpipe.model.recipe import Recipe
from helixpipe.model.rope import Ropes
from helixpipe.parts.lora import DOWN, UP
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import slice_of, whole_name

MODULES: dict[str, Callable[[Recipe], nn.Module]] = {
    "embed": embed.make, "norm": norm.make, "qkv": qkv.make, "attn": attn.make, "proj": proj.make, "mlp": mlp.make,
    "block": block.make, "head": head.make, "lookup": lookup.make, "joined": joined.make, "final": final.make,
    "logits": logits.make, "loss": loss.make,
}  # fmt: skip


class Model(Protocol):
    """What a pipeline asks of a model. How each part is called stands in the first line of its file in `model`."""

    @property
    def shape(self) -> ModelShape:
        """From which messages and costs are computed."""

    def part(self, part: Part) -> nn.Module:
        """The module of a part, with its initial parameters; the same values whoever asks.

        A class of someone's own is asked for shards of head and embedding only where it says so: `spreads_vocabulary = True`.
        """


def _every(name: str) -> bool:
    return True


class Held(NamedTuple):
    """What a rank holds of the parameters of its parts."""

    local: ModelShape
    """The shape of one tensor-parallel rank's share."""
    rank: int = 0
    """Which of them it is."""
    owns: Callable[[str], bool] = _every
    """Whether it has a parameter's values, by full name; those of others come to it in messages."""


@runtime_checkable
class Holding(Model, Protocol):
    """A model that gives a rank no more than it holds, such as one whose parameters are in files."""

    def part_for(self, part: Part, held: Held) -> nn.Module:
        """As `part`, with parameters of the share's sizes; those that it does not own have no values."""


class Decoder:
    """The model of a ModelShape. Parameters are initialised by name from the seed, whatever the placement."""

    def __init__(
        self, shape: ModelShape, seed: int = 0, mlp_chunk: int = 0, head_chunk: int = 0, z_loss: float = 0.0
    ) -> None:
        """`mlp_chunk`, `head_chunk`: tokens at a time through the MLP and the head, on all ranks that share a sequence
        together; 0 is all at once. `z_loss`: what (log-sum-exp of the logits)^2 weighs in the gradient; losses are without.
        """
        self.shape, self.seed = shape, seed
        self.recipe = Recipe(shape, Ropes(shape), mlp_chunk, head_chunk, z_loss=z_loss)

    def bare(self, part: Part) -> nn.Module:
        """The module of a part, its parameters without memory."""
        with torch.device("meta"):
            recipe = replace(self.recipe, layer=part.layer, shard=part.shard, shards=part.shards)
            return MODULES[part.kind](recipe)

    def part(self, part: Part) -> nn.Module:
        module = self.bare(part)
        for place, bare in list(module.named_parameters()):
            name = self.shape.parameter_name(part, place)
            # not `to_empty`: on the meta device torch imports sympy for it, a third of a second
            put(module, place, nn.Parameter(self._initial(name, bare), self.shape.trains(name)))
        return module

    def _initial(self, name: str, bare: Tensor) -> Tensor:
        """Of a slice, rows of what the whole parameter begins as."""
        found = slice_of(name)
        rows = bare.shape[0] if found is None else found.rows
        values = torch.empty(rows, *bare.shape[1:], dtype=bare.dtype)
        self._initialise(whole_name(name), values)
        return values if found is None else values[found.start : found.stop].clone()

    @torch.no_grad()
    def _initialise(self, name: str, parameter: Tensor) -> None:
        """GPT-2's: normal of 0.02, smaller by sqrt(2L) where a layer adds to the residual; norms multiply by 1, biases 0.

        Of adapters, A is uniform below into^-0.5 and B is 0.
        """
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(0.0 if self.shape.norm_offset else 1.0)
        elif name.endswith(f"{UP}.weight"):
            parameter.zero_()
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            if name.endswith(f"{DOWN}.weight"):
                bound = parameter.shape[1] ** -0.5  # torch's for linear layers, as PEFT has it
                parameter.uniform_(-bound, bound, generator=generator)
                return
            residual = name.endswith(("o.weight", "down.weight"))
            parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.shape.layers if residual else 1), generator=generator)


def put(module: nn.Module, place: str, parameter: nn.Parameter) -> None:
    """Let `parameter` be the module's at this place, such as `up.weight`."""
    path, _, leaf = place.rpartition(".")
    setattr(module.get_submodule(path), leaf, parameter)
