"""Gradient norm: of all parameters of all ranks, each counted once, on however many ranks it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from helixpipe.runtime.mesh import Place


def squares(parameters: Mapping[str, nn.Parameter], cuts: Collection[str], device: torch.device) -> Tensor:
    """Sums of this rank's gradients' squares, float64 [2]: of parameters that tp divides (`cuts`), and of others. Nothing is read."""
    named = [(name, p.grad) for name, p in sorted(parameters.items()) if p.grad is not None]
    divided = [gradient for name, gradient in named if name in cuts]
    whole = [gradient for name, gradient in named if name not in cuts]
    return torch.stack([_squared(each, device) for each in (divided, whole)])


def norm_of(rows: Sequence[tuple[float, float]], places: Sequence[Place]) -> float:
    """From what `squares` gave on the ranks at these places: the same on every rank, added in their order."""
    each = zip(places, rows, strict=True)
    return math.sqrt(sum(d + w * (place.tp == 0) for place, (d, w) in each if place.dp == place.cp == 0))


@torch.no_grad()
def clip(parameters: Mapping[str, nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients of this norm down to `max_norm`, where it is above."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if norm > max_norm and gradients:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))


def _squared(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
