"""The architectures that there are, and which of them a config or a shape is."""

from __future__ import annotations

import json

from helixpipe.errors import ConfigError
from helixpipe.hub.architecture import Architecture
from helixpipe.hub.entries import Config
from helixpipe.hub.gemma import GEMMA2, GEMMA3
from helixpipe.hub.gpt2 import GPT2
from helixpipe.hub.llama import LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3
from helixpipe.hub.modernbert import MODERNBERT
from helixpipe.hub.phi3 import PHI3
from helixpipe.parts.shape import ModelShape

ARCHITECTURES = {
    each.name: each for each in (LLAMA, QWEN2, QWEN3, MISTRAL, PHI3, GEMMA2, GEMMA3, OLMO2, GPT2, MODERNBERT)
}
"""By model_type."""
_INSIDE = {"gemma3": "gemma3_text"}
"""Models of several kinds of input, and the text model in them."""


def architecture_of(config: Config) -> Architecture:
    """What a config says that it is; raises ConfigError."""
    name = config.get("model_type")
    if name is None:
        raise ConfigError(f"model_type: missing; known: {', '.join(ARCHITECTURES)}")
    if name in _INSIDE:
        raise ConfigError(
            f"model_type: '{name}' is of images too; save its text model alone, which is '{_INSIDE[name]}'"
        )
    if name not in ARCHITECTURES:
        raise ConfigError(f"model_type: {json.dumps(name)} is not known; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def fitting(shape: ModelShape) -> Architecture:
    """The first architecture that can say all of a shape; raises ConfigError that names what the nearest one cannot."""
    missing: dict[str, list[str]] = {}
    for name, each in ARCHITECTURES.items():
        try:
            differs = each.differences(shape, each.say(shape))
        except ConfigError:
            continue
        if not differs:
            return each
        missing[name] = [f"model.{field} {value!r}" for field, value in differs.items()]
    nearest_one = min(missing, key=lambda name: len(missing[name]), default="")
    lacks = ", ".join(missing.get(nearest_one, []))
    raise ConfigError(f"no architecture has this model: the nearest is {nearest_one}, which cannot have {lacks}")
