"""Entries of an architecture's table: keys of a config.json, and fields of a ModelShape. Each is read in both directions.

Value("num_key_value_heads", "kv_heads", None)     one key, one field; an absent key has the class's default
Always(norm_offset=True)                           fields that no key says
Only("attention_bias", False)                      a key that may have one value alone
AttentionBias()                                    one key, two fields
Dropouts(attention_dropout=0.0)                    keys that must be 0, because nothing is dropped here
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from helixpipe.errors import ConfigError
from helixpipe.parts.shape import ModelShape

Config = Mapping[str, Any]
"""What a config.json holds."""

SILU = {"silu": "swiglu", "swish": "swiglu"}
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
GATED = SILU | {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
"""Activations -> MLPs of two matrices, and of three."""


class Entry(Protocol):
    """Raises ConfigError, which begins with the key, for a value that cannot be."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the config that it knows."""
        ...

    def read(self, config: Config) -> dict[str, Any]:
        """Fields of the shape."""

    def write(self, shape: ModelShape) -> dict[str, Any]:
        """Keys that say so. Where no config can, what is read from them differs from the shape."""


_KINDS: dict[str, Any] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def typed(key: str, value: Any, kind: str) -> Any:
    """A value of the kind that is asked for; raises ConfigError."""
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{key}: {json.dumps(value)} will not do; it is {_WORDS[kind]}")
    return float(value) if kind == "float" else value


@dataclass(frozen=True)
class Value:
    """One key and one field."""

    key: str
    field: str
    default: Any
    """Of the key, where it is absent."""
    nullable: bool = False
    """Whether the key may be null, which a default of null says too."""
    null: Callable[[Config], Any] = lambda config: 0
    """What the field is then."""
    words: Mapping[str, str] | None = None
    """The config's word -> ours; where several mean the same, the first is written."""
    implied: Callable[[ModelShape], Any] | None = None
    """The field that need not be written."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key, self.default)
        if value is None and (self.nullable or self.default is None):
            return {self.field: self.null(config)}
        kind = str(ModelShape.__dataclass_fields__[self.field].type)
        value = typed(self.key, value, "str" if self.words else kind)
        if self.words is None:
            return {self.field: value}
        if value not in self.words:
            raise ConfigError(f"{self.key}: '{value}' is not known; known: {', '.join(self.words)}")
        return {self.field: self.words[value]}

    def write(self, shape: ModelShape) -> dict[str, Any]:
        value = getattr(shape, self.field)
        if self.implied is not None and value == self.implied(shape):
            return {}
        if self.words is not None:
            word = next((word for word, ours in self.words.items() if ours == value), None)
            return {} if word is None else {self.key: word}
        if value == 0 and (self.nullable or self.default is None) and not isinstance(value, bool):
            return {self.key: None}
        return {self.key: value}


class Always:
    """Fields that every model of an architecture has, whatever its config says."""

    keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def read(self, config: Config) -> dict[str, Any]:
        return dict(self.fields)

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Only:
    """A key that may be absent, null or one value: any other asks for a computation that there is none of here."""

    key: str
    value: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key)
        if value is not None and value != self.value:
            raise ConfigError(
                f"{self.key}: {json.dumps(value)} is not computed here, {json.dumps(self.value)} alone is; "
                "use another model"
            )
        return {}

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class AttentionBias:
    """One key for the biases of q, k, v and of the output projection."""

    key: str = "attention_bias"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        biased = typed(self.key, config.get(self.key) or False, "bool")
        return {"qkv_bias": biased, "o_bias": biased}

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {self.key: shape.qkv_bias}


class Dropouts:
    """Shares of activations that the model's own training drops, with the class's defaults."""

    def __init__(self, **defaults: float) -> None:
        self.defaults = defaults

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.defaults)

    def read(self, config: Config) -> dict[str, Any]:
        found = {key: config.get(key, default) for key, default in self.defaults.items()}
        asked = {key: value for key, value in found.items() if value}
        if asked:
            shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in asked.items())
            raise ConfigError(
                f"{next(iter(asked))}: nothing is dropped out here, and this model trains with {shown}; "
                f"write 0.0 for {'it' if len(asked) == 1 else 'each'} into the config to train without"
            )
        return {}

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return dict.fromkeys(self.defaults, 0.0)


@dataclass(frozen=True)
class EmbedScale:
    """Gemma multiplies what it looks up by the root of the hidden size."""

    hidden: int
    """The class's default."""
    keys: ClassVar[tuple[str, ...]] = ()

    def read(self, config: Config) -> dict[str, Any]:
        return {"embed_scale": float(typed("hidden_size", config.get("hidden_size", self.hidden), "int")) ** 0.5}

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {}


def length(default: int) -> Value:
    """The longest sequence of rotary positions, which is no limit here."""
    return Value("max_position_embeddings", "context", default, implied=lambda shape: 0)


def sizes(**defaults: int) -> tuple[Value, ...]:
    """The five sizes that most configs spell alike, with the class's defaults."""
    fields = {
        "vocab_size": "vocabulary", "hidden_size": "hidden", "intermediate_size": "ffn",
        "num_hidden_layers": "layers", "num_attention_heads": "heads",
    }  # fmt: skip
    return tuple(Value(key, fields[key], default) for key, default in defaults.items())
