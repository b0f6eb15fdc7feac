"""Sliding windows in a config: how far back a token sees, and in which layers.

    sliding_window: 4096                                        every layer (Mistral, Phi-3)
    sliding_window, use_sliding_window, max_window_layers       the layers from there on, where it is used (Qwen)
    sliding_window, layer_types or sliding_window_pattern: 6    all but every sixth (Gemma)
    local_attention: 128, global_attn_every_n_layers: 3         64 to either side (ModernBERT)

transformers: a token at i sees j where i - j < sliding_window, and ModernBERT's where |i - j| <= local_attention / 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.hub.entries import Config, typed
from helixpipe.parts.shape import ModelShape

FULL, SLIDING = "full_attention", "sliding_attention"


def repeating(layers: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest pattern that these are repetitions of; () where all have the window."""
    for period in range(1, len(layers) + 1):
        if all(each == layers[i % period] for i, each in enumerate(layers)):
            return () if layers[0] and period == 1 else tuple(layers[:period])
    return ()


def fields(window: int, layers: Sequence[bool]) -> dict[str, Any]:
    """Of the shape."""
    if not window or not any(layers):
        return {"window": 0, "window_pattern": ()}
    return {"window": window, "window_pattern": repeating(layers)}


def layer_types(shape: ModelShape) -> list[str]:
    return [SLIDING if shape.window_of(layer) else FULL for layer in range(shape.layers)]


def _sliding(config: Config, layers: int, otherwise: Sequence[bool]) -> list[bool]:
    """Which layers have the window: what `layer_types` says, or else what the class makes of other keys."""
    given = config.get("layer_types")
    if given is None:
        return list(otherwise)
    if not isinstance(given, list) or len(given) != layers:
        raise ConfigError(f"layer_types: {json.dumps(given)} will not do; it names a type for each of {layers} layers")
    for each in given:
        if each not in (FULL, SLIDING):
            raise ConfigError(f"layer_types: '{each}' is not known; known: {FULL}, {SLIDING}")
    return [each == SLIDING for each in given]


def _layers(config: Config, default: int) -> int:
    return int(typed("num_hidden_layers", config.get("num_hidden_layers", default), "int"))


def _size(config: Config, default: int | None) -> int:
    """Tokens; 0 where it is null."""
    value = config.get("sliding_window", default)
    size = 0 if value is None else int(typed("sliding_window", value, "int"))
    if value is not None and size < 1:
        raise ConfigError(f"sliding_window: {size}; give at least 1, or null for none")
    return size


@dataclass(frozen=True)
class EveryLayer:
    default: int | None
    keys: tuple[str, ...] = ("sliding_window",)

    def read(self, config: Config) -> dict[str, Any]:
        return fields(_size(config, self.default), [True])

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {"sliding_window": shape.window or None}


@dataclass(frozen=True)
class FromLayer:
    """Qwen: a window that is given may be unused."""

    layers: int
    default: int = 4096
    first: int = 28
    keys: tuple[str, ...] = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Config) -> dict[str, Any]:
        layers = _layers(config, self.layers)
        used = typed("use_sliding_window", config.get("use_sliding_window") or False, "bool")
        first = typed("max_window_layers", config.get("max_window_layers", self.first), "int")
        window = _size(config, self.default) if used else 0
        sliding = _sliding(config, layers, [bool(window) and layer >= first for layer in range(layers)])
        if any(sliding) and not window:
            raise ConfigError(f"layer_types: {SLIDING} is asked for, and use_sliding_window or sliding_window is off")
        return fields(window, sliding)

    def write(self, shape: ModelShape) -> dict[str, Any]:
        types = layer_types(shape)
        first = types.index(SLIDING) if SLIDING in types else shape.layers
        return {
            "sliding_window": shape.window or None, "use_sliding_window": bool(shape.window),
            "max_window_layers": first, "layer_types": types,
        }  # fmt: skip


@dataclass(frozen=True)
class AllButEvery:
    """Gemma: every so many layers one has none."""

    layers: int
    every: int
    default: int = 4096
    pattern_key: str = ""
    """The key that may say how many, in older configs."""

    @property
    def keys(self) -> tuple[str, ...]:
        old = (self.pattern_key, f"_{self.pattern_key}") if self.pattern_key else ()
        return ("sliding_window", "layer_types", *old)

    def read(self, config: Config) -> dict[str, Any]:
        layers, every = _layers(config, self.layers), self.every
        if self.pattern_key:
            every = typed(self.pattern_key, config.get(self.pattern_key, self.every), "int")
            if every < 1:
                raise ConfigError(f"{self.pattern_key}: {every}; give at least 1")
        sliding = _sliding(config, layers, [(layer + 1) % every != 0 for layer in range(layers)])
        window = _size(config, self.default)
        if any(sliding) and not window:
            raise ConfigError(f"sliding_window: null, and layer_types asks for {SLIDING}; give the tokens")
        return fields(window, sliding)

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {"sliding_window": shape.window or self.default, "layer_types": layer_types(shape)}


@dataclass(frozen=True)
class ToEitherSide:
    """ModernBERT: the window is twice what a token sees to one side, and every so many layers one has none."""

    layers: int
    every: int = 3
    default: int = 128
    keys: tuple[str, ...] = ("local_attention", "layer_types", "global_attn_every_n_layers")

    def read(self, config: Config) -> dict[str, Any]:
        layers = _layers(config, self.layers)
        every = typed(self.keys[2], config.get(self.keys[2], self.every), "int")
        if every < 1:
            raise ConfigError(f"{self.keys[2]}: {every}; give at least 1")
        both = typed("local_attention", config.get("local_attention", self.default), "int")
        return fields(both // 2 + 1, _sliding(config, layers, [layer % every != 0 for layer in range(layers)]))

    def write(self, shape: ModelShape) -> dict[str, Any]:
        both = 2 * (shape.window - 1) if shape.window else self.default
        return {"local_attention": both, "layer_types": layer_types(shape)}
