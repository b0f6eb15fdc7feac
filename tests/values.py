"""Values of a model's parameters by full name: out of a Decoder, and into one. No part is run here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import helixpipe as hp


def parts_of(shape: hp.ModelShape) -> Iterator[hp.Part]:
    """Every part with parameters, in order."""
    yield hp.Part("embed", 0)
    for layer in range(shape.layers):
        for kind in ("norm", "qkv", "proj", "mlp"):
            yield hp.Part(kind, layer)
    yield hp.Part("head", shape.layers)


def initial_values(shape: hp.ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """What a Decoder starts with. A tied table stands once, as the embedding's."""
    decoder = hp.Decoder(shape, seed)
    found: dict[str, Tensor] = {}
    for part in parts_of(shape):
        for name, parameter in decoder.part(part).named_parameters():
            found.setdefault(shape.parameter_name(part, name), parameter.detach())
    return found


class Given:
    """A model for a pipeline: a Decoder whose parameters have the values given."""

    def __init__(self, shape: hp.ModelShape, values: dict[str, Tensor], chunk: int = 0) -> None:
        """`chunk`: tokens at a time through MLP and head; 0 is all at once."""
        self.shape, self.values = shape, values
        self._decoder = hp.Decoder(shape, mlp_chunk=chunk, head_chunk=chunk)

    @torch.no_grad()
    def part(self, part: hp.Part) -> nn.Module:
        module = self._decoder.part(part).double()
        for name, parameter in module.named_parameters():
            value = self.values[self.shape.parameter_name(part, name)]
            assert value.shape == parameter.shape, f"{part} {name}"
            parameter.copy_(value)
        return module
