"""Rotary: how rotary positions are scaled, without torch: frequencies, and what cos and sin are multiplied by.

    default     b^(-2i/d)                                          arXiv 2104.09864
    linear      all divided by the factor                          arXiv 2306.15595
    dynamic     a base that grows with the sequence, beyond the original length ("NTK-aware")
    yarn        slow ones divided, fast ones left, a ramp between; cos and sin grow with log(factor)     arXiv 2309.00071
    llama3      the same idea with a ramp over wavelengths         Llama 3.1
    longrope    each divided by a number of its own, for short or for long sequences                     arXiv 2402.13753

Rules and defaults are those of transformers (`modeling_rope_utils`), so that a config means here what it means there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError, nearest


class Keys(NamedTuple):
    """What a type must be given and what it may be given."""

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


TYPES = {
    "default": Keys(),
    "linear": Keys(("factor",)),
    "dynamic": Keys(("factor", "original")),
    "yarn": Keys(
        ("factor", "original"), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "llama3": Keys(("factor", "original", "low_freq_factor", "high_freq_factor")),
    "longrope": Keys(("original", "short_factor", "long_factor"), ("factor", "attention_factor")),
}
"""Type -> its keys."""
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")  # which is as unset


@dataclass(frozen=True)
class Rotary:
    """The keys of a Hugging Face config's `rope_parameters` (`rope_scaling` in older ones), but for the base.

    None is the type's own default. Raises ConfigError for a key that a type does not take, needs, or that cannot be.
    """

    type: str = "default"
    """`rope_type`, or `type`."""
    factor: float | None = None
    """How many times longer; of longrope, whose config may lack it, the longest length over the original one."""
    original: int | None = None
    """The length that the frequencies were trained for: `original_max_position_embeddings`; of dynamic, whose config has
    none, `max_position_embeddings`."""
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ConfigError(f"model.rope.type: '{self.type}' is not known{nearest(self.type, TYPES)}")
        keys = TYPES[self.type]
        known = (*keys.needs, *keys.takes)
        for name, value in self.given.items():
            if name not in known:
                what = f"takes {', '.join(known)}" if known else "takes no keys: give model.rope.type too"
                raise ConfigError(f"model.rope.{name}: {self.type} has no such key, it {what}")
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if not math.isfinite(each) or each < 0 or (each == 0 and name not in (*_MAY_BE_ZERO, "truncate")):
                    raise ConfigError(f"model.rope.{name}: {each:g}; give more than 0")
        for name in keys.needs:
            if getattr(self, name) is None:
                raise ConfigError(f"model.rope.{name}: {self.type} needs it, and it is not given")
        self._check_together()

    def _check_together(self) -> None:
        if self.original is not None and self.original < 2:
            raise ConfigError(f"model.rope.original: {self.original}; give at least 2 tokens")
        if self.type == "longrope" and self.factor is None and self.attention_factor is None:
            raise ConfigError(
                "model.rope.factor: longrope needs it or attention_factor; give the longest length over the original one"
            )
        fast, slow = self.beta_fast or 32, self.beta_slow or 1
        if fast < slow:
            raise ConfigError(f"model.rope.beta_fast: {fast:g} is below beta_slow {slow:g}; give at least as much")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not low < high:
            raise ConfigError(f"model.rope.high_freq_factor: {high:g} is not above low_freq_factor {low:g}; raise it")

    @property
    def given(self) -> dict[str, float | tuple[float, ...]]:
        """The keys that are set, beside the type."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "type"}
        return {name: value for name, value in found.items() if value is not None}

    def check(self, dim: int, base: float) -> None:
        """Raise ConfigError where it cannot be of heads of which `dim` numbers are rotated, or with this base."""
        for name in ("short_factor", "long_factor"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != -(-dim // 2):
                raise ConfigError(
                    f"model.rope.{name}: {len(numbers)} numbers, and {dim} of a head are rotated; give {-(-dim // 2)}"
                )
        if self.type == "dynamic" and dim < 4:
            raise ConfigError(f"model.rope.type: dynamic rotates 4 numbers of a head at least, and here are {dim}")
        if self.type == "yarn" and not base > 1:
            raise ConfigError(f"model.rope_base: {base:g}; yarn needs more than 1")

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length of the whole sequence."""
        return self.type in ("dynamic", "longrope")

    def reach(self, length: int) -> int:
        """What frequencies depend on, of a sequence's length: sequences of the same reach have the same ones."""
        if self.type == "dynamic":
            return max(length, self.original or 0)
        return int(self.by_length and length > (self.original or 0))

    def frequencies(self, dim: int, base: float, length: int) -> tuple[float, ...]:
        """Radians a position, of each pair: dim / 2 of them, an odd one rounded up.

        `dim`: how many numbers of a head are rotated; `length`: tokens of the whole sequence.
        """
        return _frequencies(self, dim, base, self.reach(length))

    def with_keys(self, keys: Mapping[str, Any], made_for: int = 0) -> Rotary:
        """With a type among the keys: that, of these keys alone, and `original`, when not given, what this one's is, or else
        `made_for`. Without: this one with these keys changed.
        """
        if "type" not in keys:
            return replace(self, **keys)
        known = TYPES.get(keys["type"], Keys())
        original = self.original or made_for
        if original and "original" in known.needs:
            keys = {"original": original} | dict(keys)
        return Rotary(**keys)

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or 1.0
        if self.type == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(self.original or 0)) if factor > 1 else 1.0
        if self.mscale and self.mscale_all_dim:
            return _mscale(factor, self.mscale) / _mscale(factor, self.mscale_all_dim)
        return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


@lru_cache(maxsize=64)
def _frequencies(rotary: Rotary, dim: int, base: float, reach: int) -> tuple[float, ...]:
    factor, original = rotary.factor or 1.0, rotary.original or 0
    if rotary.type == "dynamic":
        base *= (factor * reach / original - (factor - 1)) ** (dim / (dim - 2))
    plain = [base ** -(i / dim) for i in range(0, dim, 2)]
    match rotary.type:
        case "linear":
            return tuple(f / factor for f in plain)
        case "yarn":
            shares = _yarn_ramp(rotary, dim, base)
            return tuple(f * (share / factor + 1 - share) for f, share in zip(plain, shares, strict=True))
        case "llama3":
            return tuple(_llama3(rotary, f) for f in plain)
        case "longrope":
            numbers = rotary.long_factor if reach else rotary.short_factor
            return tuple(f / number for f, number in zip(plain, numbers or (), strict=True))
    return tuple(plain)


def _yarn_ramp(rotary: Rotary, dim: int, base: float) -> list[float]:
    """How far each frequency is divided, from 0 (as it was) to 1: between those that turn beta_fast and beta_slow times
    within the original length."""

    def place(turns: float) -> float:
        """Which of the `dim` numbers turns so often."""
        return dim * math.log((rotary.original or 0) / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(rotary.beta_fast or 32), place(rotary.beta_slow or 1)
    if rotary.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return [min(max((i - low) / width, 0.0), 1.0) for i in range(-(-dim // 2))]


def _llama3(rotary: Rotary, frequency: float) -> float:
    """As it was where it turns high_freq_factor times or more within the original length, divided where it turns less
    than low_freq_factor times, between them a mean of both."""
    factor, low, high = rotary.factor or 1.0, rotary.low_freq_factor or 0, rotary.high_freq_factor or 0
    turns = (rotary.original or 0) * frequency / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - kept) * frequency / factor + kept * frequency
