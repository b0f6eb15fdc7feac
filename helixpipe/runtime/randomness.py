"""Randomness: the random numbers of a part are those of its name, micro-batch, segment and step.

A part that draws (dropout, noise) is run with the generators seeded by these, in its forward and in every recompute, so
that neither a schedule, nor a recompute policy, nor a rank count changes a gradient. The generators' own state is put back
afterwards: what a caller draws between steps does not depend on the pipeline either.

Of torch's default generators on the CPU and on the pipeline's device; not of numpy's or Python's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from helixpipe.parts.part import Part

# torch's own layers that draw nothing; so do all of ours
DRAW_NOTHING = (
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict,
    nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Conv1d,
)  # fmt: skip


def may_draw(module: nn.Module) -> bool:
    """Whether a part's module may draw random numbers: where it is somebody's own, nobody knows."""
    return not all(
        type(inner) in DRAW_NOTHING or type(inner).__module__.startswith("helixpipe.model")
        for inner in module.modules()
    )


@dataclass(frozen=True)
class Stream:
    """Of one segment of one micro-batch, in one step. `seed` is the run's."""

    seed: int
    step: int
    microbatch: int
    segment: int
    place: tuple[int, ...] = ()
    """Where ranks share a sequence: this one's place among them."""

    @contextmanager
    def of(self, part: Part, device: torch.device) -> Iterator[None]:
        """Within it, a part draws its own numbers."""
        told = f"{self.seed} {self.step} {self.microbatch} {self.segment} {self.place} {part}".encode()
        seed = zlib.crc32(told) | zlib.adler32(told) << 32
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed & (1 << 63) - 1)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it they are in eval mode; afterwards each is in the mode in which it was handed over."""
    training = [inner for module in modules for inner in module.modules() if inner.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
