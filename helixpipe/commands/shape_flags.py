"""Keys of a model's shape as flags: `--layers 40` changes what --model names, as `--model.layers 40` does in training."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.flags import Parser, decimal, flag, number
from helixpipe.hub.folder import model_shape
from helixpipe.parts.shape import ModelShape

TIMED_KEYS = (
    "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "norm", "mlp", "positions", "context",
    "qkv_bias", "bias", "qk_norm", "causal", "norms", "norm_offset", "o_bias", "qk_norm_over", "head_transform", "window",
    "softcap",
)  # fmt: skip
"""Those that decide what a part costs."""
SHAPE_KEYS = ("layers", *TIMED_KEYS, "tied")


def add_shape_flags(parser: Parser, keys: Sequence[str] = SHAPE_KEYS) -> None:
    own = parser.add_argument_group("changes to the model")
    kinds: dict[str, Callable[[str], Any]] = {"int": number, "float": decimal, "str": str, "bool": _truth}
    fields = {field.name: str(field.type) for field in dataclasses.fields(ModelShape)}
    for key in keys:
        metavar = {"int": "N", "float": "X", "str": "NAME"}.get(fields[key], "BOOL")
        own.add_argument(_flag(key, keys), dest=f"model_{key}", type=kinds[fields[key]], metavar=metavar)


def changes_from(args: Namespace) -> dict[str, Any]:
    """Those that are given."""
    return {key: value for key in SHAPE_KEYS if (value := getattr(args, f"model_{key}", None)) is not None}


def _flag(key: str, keys: Sequence[str]) -> str:
    """Where a schedule's options stand beside them, `--vocabulary` is where that is."""
    return "--vocabulary-size" if key == "vocabulary" and keys is SHAPE_KEYS else flag(key)


def shape_from(args: Namespace, keys: Sequence[str] = SHAPE_KEYS) -> ModelShape:
    """Raises ConfigError that names the flag."""
    try:
        return model_shape(args.model, **changes_from(args))
    except ConfigError as error:  # which names keys of a config
        key, _, fault = str(error).removeprefix("model.").partition(": ")
        raise ConfigError(f"{'--model' if key in ('name', 'path') else _flag(key, keys)}: {fault}") from None


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ArgumentTypeError(f"'{text}' is neither true nor false")
    return text == "true"
