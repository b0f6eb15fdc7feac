"""Gradient norm: of all parameters of all ranks, each counted once, on however many ranks it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from helixpipe.runtime.mesh import Place


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    cuts: Collection[str],
    places: Sequence[Place],
    gathered: Callable[[list[float]], list[list[float]]],
) -> float:
    """The same on every rank. Collective. `cuts`: the parameters that tp divides; `gathered`: every rank's numbers, by place."""
    named = [(name, p.grad) for name, p in sorted(parameters.items()) if p.grad is not None]
    divided = _squared(gradient for name, gradient in named if name in cuts)
    whole = _squared(gradient for name, gradient in named if name not in cuts)
    rows = zip(places, gathered([divided, whole]), strict=True)
    return math.sqrt(sum(d + w * (place.tp == 0) for place, (d, w) in rows if place.dp == place.cp == 0))


def _squared(gradients: Iterable[Tensor]) -> float:
    """The sum of all elements' squares."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return float(torch.stack(norms).square().sum()) if norms else 0.0
