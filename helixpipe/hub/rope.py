"""Rotary positions in a config: `rope_theta` with `rope_scaling`, or `rope_parameters`, or one of these a kind of layer.

{"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, ...}}                           until transformers 4
{"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0, ...}}                   transformers 5
{"rope_parameters": {"full_attention": {...}, "sliding_attention": {"rope_theta": 1e4, ...}}}       models with windows
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.hub.entries import Config, typed
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape

ORIGINAL = "original_max_position_embeddings"
LENGTH = "max_position_embeddings"
# key of a config -> field of Rotary
_FIELDS = {
    "factor": "factor", ORIGINAL: "original", "attention_factor": "attention_factor", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim", "truncate": "truncate",
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", "short_factor": "short_factor",
    "long_factor": "long_factor",
}  # fmt: skip
_ABOUT = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_OLDER_BASES = (("global_rope_theta", "local_rope_theta"), ("rope_theta", "rope_local_base_freq"))
_LENGTH_IS_ORIGINAL = ("llama3", "yarn", "longrope", "dynamic")
"""Types whose original length is the model's longest, where a config says no other."""


@dataclass(frozen=True)
class Rope:
    """One kind of rotary positions in all layers."""

    base: float = 10000.0
    """The class's default."""
    length: int = 2048
    """Its longest sequence."""
    original: int = 0
    """Phi-3's `original_max_position_embeddings` beside the table, which goes before what is in it."""
    partial: bool = False
    """Whether `partial_rotary_factor` is read."""
    types: tuple[str, ...] = ()
    """The types that its class takes; () is all."""

    @property
    def keys(self) -> tuple[str, ...]:
        more = (ORIGINAL,) if self.original else ()
        return ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", *more)

    def read(self, config: Config) -> dict[str, Any]:
        table, where = _table(config)
        base = _theta(table, where, config.get("rope_theta"), "rope_theta", self.base)
        outside = config.get(ORIGINAL, self.original) if self.original else None
        rope = rotary(table, where, config.get(LENGTH, self.length), outside, self.types)
        share = _either(table, where, config, "partial_rotary_factor")
        if share is not None and not self.partial and share != 1:
            raise ConfigError(f"{where}partial_rotary_factor: {share:g}; this architecture rotates whole heads")
        return {"rope_base": base, "rope": rope} | (
            {"rotary_share": 1.0 if share is None else share} if self.partial else {}
        )

    def write(self, shape: ModelShape) -> dict[str, Any]:
        table = parameters(shape.rope, shape.rope_base)
        if self.partial and shape.rotary_share != 1:
            table["partial_rotary_factor"] = shape.rotary_share
        outside = {ORIGINAL: shape.rope.original} if self.original and shape.rope.original else {}
        return {"rope_parameters": table} | outside


@dataclass(frozen=True)
class RopeByLayer:
    """One kind in layers without a window, and a base of their own, never scaled, in those with one."""

    base: float
    window_base: float
    length: int
    base_key: str = "rope_theta"
    window_key: str = "rope_local_base_freq"
    """The bases' keys until transformers 4."""
    scales_windows: bool = False
    """Whether an old `rope_scaling` is of all layers."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.base_key, self.window_key, "rope_scaling", "rope_parameters")

    def read(self, config: Config) -> dict[str, Any]:
        given = _mapping(config.get("rope_parameters"), "rope_parameters")
        for key in given:
            if key not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    f"rope_parameters.{key}: not known here; this architecture has them for full_attention and "
                    "sliding_attention"
                )
        full = _mapping(given.get("full_attention"), "rope_parameters.full_attention")
        window = _mapping(given.get("sliding_attention"), "rope_parameters.sliding_attention")
        old = _mapping(config.get("rope_scaling"), "rope_scaling")
        if old and any(key in full and full[key] != value for key, value in old.items()):
            raise ConfigError("rope_scaling: it and rope_parameters do not say the same; leave one of them")
        where, beside = "rope_parameters.full_attention.", "rope_parameters.sliding_attention."
        length = config.get(LENGTH, self.length)
        rope = rotary(full | old, "rope_scaling." if old and not full else where, length)
        other = rotary(window | (old if self.scales_windows else {}), beside, length)
        if other != Rotary():
            raise ConfigError(
                f"{beside}rope_type: '{other.type}'; positions in layers with a window are never scaled here"
            )
        return {
            "rope_base": _theta(full, where, config.get(self.base_key), self.base_key, self.base),
            "rope": rope,
            "window_rope_base": _theta(window, beside, config.get(self.window_key), self.window_key, self.window_base),
        }

    def write(self, shape: ModelShape) -> dict[str, Any]:
        return {
            "rope_parameters": {
                "full_attention": parameters(shape.rope, shape.rope_base),
                "sliding_attention": parameters(Rotary(), shape.window_rope_base or shape.rope_base),
            }
        }


def rotary(
    table: Mapping[str, Any], where: str, length: int, outside: int | None = None, types: tuple[str, ...] = ()
) -> Rotary:
    """How positions are scaled, from a table in either spelling. `length`: the model's longest sequence. `outside`: an
    original length beside the table. Raises ConfigError.
    """
    kind = table.get("rope_type", table.get("type")) or "default"
    if types and kind == "su":  # an older name
        kind = "longrope"
    if types and kind not in types:
        raise ConfigError(f"{where}rope_type: '{kind}' is not known of this architecture; known: {', '.join(types)}")
    fields: dict[str, Any] = {}
    for key, value in table.items():
        if key in _FIELDS:
            if value is not None:
                fields[_FIELDS[key]] = tuple(value) if isinstance(value, list) else value
                if key == ORIGINAL:
                    typed(f"{where}{key}", value, "int")
        elif key not in _ABOUT and value not in (None, False):
            raise ConfigError(f"{where}{key}: {json.dumps(value)} is not known; known: {', '.join(_FIELDS)}")
    if kind == "default":
        fields.pop("original", None)  # transformers writes it and reads it not
    elif kind in _LENGTH_IS_ORIGINAL:
        if kind == "dynamic":  # whose length is the original one, whatever else stands there
            fields["original"] = length
        elif outside is not None:
            fields["original"] = outside
        fields.setdefault("original", length)
    if kind == "longrope" and "factor" not in fields and "attention_factor" not in fields:
        fields["factor"] = max(length / fields["original"], 1.0)
    try:
        return Rotary(type=kind, **fields)
    except ConfigError as error:
        raise ConfigError(_in_config_words(str(error), where)) from None
    except TypeError:
        raise ConfigError(f"{where}: {json.dumps(dict(table))}: a value is not a number") from None


def parameters(rope: Rotary, base: float) -> dict[str, Any]:
    """As transformers 5 writes them."""
    ours = {ours: key for key, ours in _FIELDS.items()}
    values = dataclasses.asdict(rope)
    given = {
        key: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if (key := ours.get(name)) and value is not None
    }
    if rope.type == "dynamic":
        given.pop(ORIGINAL, None)
    return {"rope_type": rope.type, "rope_theta": base} | given


def spelled_as(like: Config, written: dict[str, Any]) -> dict[str, Any]:
    """What an entry wrote, in the older spelling where the config that it goes into has that: older readers know no other,
    and would take the default without a word.
    """
    if "rope_parameters" not in written or "rope_parameters" in like:
        return written
    bases = next((keys for keys in _OLDER_BASES if any(key in like for key in keys)), None)
    if bases is None and "rope_scaling" not in like:
        return written
    table = written["rope_parameters"]
    full = dict(table.get("full_attention", table))
    base_key, window_key = bases or _OLDER_BASES[-1]
    found = {base_key: full.pop("rope_theta"), "rope_scaling": full if full["rope_type"] != "default" else None}
    if "partial_rotary_factor" in full:
        found["partial_rotary_factor"] = full.pop("partial_rotary_factor")
    if "sliding_attention" in table:
        found[window_key] = table["sliding_attention"]["rope_theta"]
    return {key: value for key, value in written.items() if key != "rope_parameters"} | found


def _in_config_words(message: str, where: str) -> str:
    """`model.rope.original: ...` -> `rope_scaling.original_max_position_embeddings: ...`"""
    name, _, rest = message.removeprefix("model.rope.").partition(": ")
    known = {ours: key for key, ours in _FIELDS.items()} | {"type": "rope_type"}
    return f"{where}{known.get(name, name)}: {rest}"


def _table(config: Config) -> tuple[dict[str, Any], str]:
    """The table, and how its keys begin."""
    new = _mapping(config.get("rope_parameters"), "rope_parameters")
    old = _mapping(config.get("rope_scaling"), "rope_scaling")
    for key in ("full_attention", "sliding_attention"):
        if key in new:
            raise ConfigError(f"rope_parameters.{key}: all layers have the same rotary positions in this architecture")
    if old and new and any(new.get(key, value) != value for key, value in old.items()):
        raise ConfigError("rope_scaling: it and rope_parameters do not say the same; leave one of them")
    return new | old, "rope_scaling." if old else "rope_parameters."


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key}: {json.dumps(value)} will not do; it is a table")
    return dict(value or {})


def _theta(table: Mapping[str, Any], where: str, beside: Any, key: str, default: float) -> float:
    """The base of rotary positions, in the table or beside it."""
    inside = table.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        raise ConfigError(f"{key}: {json.dumps(beside)}, and {where}rope_theta {json.dumps(inside)}; leave one of them")
    value = inside if inside is not None else beside
    return default if value is None else float(typed(key, value, "float"))


def _either(table: Mapping[str, Any], where: str, config: Config, key: str) -> float | None:
    """A number in the table, or beside it."""
    value = table.get(key, config.get(key))
    return None if value is None else float(typed(f"{where}{key}" if key in table else key, value, "float"))
