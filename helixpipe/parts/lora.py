"""LoRA: beside a frozen linear layer, two narrow ones that are trained (arXiv 2106.09685).

    x ──┬── W ────────────────────────────── + ── y        y = W x + scale * B (A x)
        └── A [rank, into] ── B [out, rank] ─┘

A is drawn, B begins as 0, so that a run begins as the model it came from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from helixpipe.errors import ConfigError

LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers that may have adapters, in the order of the model."""
DOWN, UP = "lora_a", "lora_b"
"""A and B, below the name of their linear layer: `layers.0.qkv.q.lora_a.weight`."""


@dataclass(frozen=True)
class Lora:
    """Adapters of all layers. Everything else is frozen."""

    rank: int
    alpha: float = 0.0
    """The scale is alpha / rank; 0 is as large as the rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Which linear layers have one."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank) (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"train.lora.rank: {self.rank}; give at least 1")
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"train.lora.alpha: {self.alpha:g}; give more than 0")
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(f"train.lora.targets: none; give some of {', '.join(LAYERS)}")
        for target in self.targets:
            if target not in LAYERS:
                raise ConfigError(f"train.lora.targets: '{target}' is no linear layer; known: {', '.join(LAYERS)}")
        object.__setattr__(self, "alpha", float(self.alpha or self.rank))
        object.__setattr__(self, "targets", tuple(each for each in LAYERS if each in self.targets))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self, gated: bool) -> None:
        """Raise ConfigError for a target that a model does not have."""
        if "gate" in self.targets and not gated:
            known = [each for each in LAYERS if each != "gate"]
            raise ConfigError(f"train.lora.targets: 'gate', and this model's MLP has none; known: {', '.join(known)}")


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its full name or that within its part, is an adapter's."""
    return name.endswith((f".{DOWN}.weight", f".{UP}.weight"))


def adapted(parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Linear layers that have an adapter, by name, with what they make and read of a token."""
    ends = f".{DOWN}.weight"
    layers = [name.removesuffix(ends) for name in parameters if name.endswith(ends)]
    return {name: (parameters[f"{name}.{UP}.weight"][0], parameters[f"{name}{ends}"][1]) for name in layers}
