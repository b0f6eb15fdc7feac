"""The keys of `model.rope`: how rotary positions are stretched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Keys of `helixpipe.parts.rotary.Rotary`. With a type they are all there is; without, they change the model's own."""

    type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] | None = None
    """default (none), linear, dynamic, yarn, llama3 or longrope; the other keys below say which take them."""
    factor: float | None = None
    """linear, dynamic, yarn, llama3, longrope: how many times longer than the model was made for."""
    original: int | None = None
    """dynamic, yarn, llama3, longrope: the length that the model was made for; the model's own when unset and known."""
    attention_factor: float | None = None
    """yarn, longrope: what cos and sin are multiplied by; follows from the factor when unset."""
    beta_fast: float | None = None
    """yarn: frequencies that turn so often within the original length stay as they are; 32 when unset."""
    beta_slow: float | None = None
    """yarn: those that turn less often than this are divided by the factor; 1 when unset."""
    mscale: float | None = None
    """yarn: with mscale_all_dim, the weights of log(factor) over and under attention_factor's fraction."""
    mscale_all_dim: float | None = None
    """yarn: see mscale."""
    truncate: bool | None = None
    """yarn: whether the ramp between both betas begins and ends at whole numbers; true when unset."""
    low_freq_factor: float | None = None
    """llama3: frequencies that turn less often within the original length are divided by the factor."""
    high_freq_factor: float | None = None
    """llama3: frequencies that turn more often stay as they are."""
    short_factor: tuple[float, ...] | None = None
    """longrope: what each frequency is divided by in sequences up to the original length."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the same in longer ones."""
