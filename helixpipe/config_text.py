"""A config as text: strict TOML and the command line, read by the same rules; an unknown key names the nearest."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import tomli_w

from helixpipe.config import FAMILY_OPTIONS, Config, OrAuto, ScheduleConfig
from helixpipe.config_check import MASK_KEYS, OBJECTIVES, check_config
from helixpipe.config_data import SourceConfig, Sources, sources_from_text, typed_sources
from helixpipe.config_replicas import counted_anew, spread
from helixpipe.errors import ConfigError, nearest

Table = dict[str, dict[str, Any]]
"""A config as TOML has it: section -> key -> value, only what was given."""

# key of an earlier version -> what took its place
_REPLACED = {
    "train.evaluate_batches": "train.evaluate_sequences took its place: held-out sequences in an evaluation, whatever a batch is"
}


def read_toml(path: str | Path) -> Table:
    """The table in a TOML file, its keys and types checked; raises ConfigError."""
    return _checked(_parsed(path), f"{path}: ")


def _parsed(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give the path of a TOML file") from None


def write_toml(config: Config) -> str:
    """The config as TOML text, every set key spelled out; `read_toml` gives it back."""
    return tomli_w.dumps(to_table(config))


def to_table(config: Config) -> Table:
    """The config's keys that are set."""
    return {section: given for section, keys in dataclasses.asdict(config).items() if (given := _set_keys(keys))}


def read_saved(path: str | Path) -> Table:
    """The config that a run saved, also of an earlier version."""
    table = _parsed(path)
    return _checked(renewed(table) if isinstance(table.get("train"), Mapping) else table, f"{path}: ")


def renewed(saved: Mapping[str, Any]) -> Table:
    """A saved config with keys of today's in place of those that were replaced, of the same meaning."""
    table = {name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in saved.items()}
    batches = saved.get("train", {}).get("evaluate_batches")
    if batches is not None:  # the sequences of so many batches: what a run saves has every key
        sizes = (("schedule", "microbatches"), ("train", "microbatch_size"), ("mesh", "dp"))
        del table["train"]["evaluate_batches"]
        table["train"]["evaluate_sequences"] = batches * math.prod(
            table.get(name, {}).get(key, 1) for name, key in sizes
        )
    return table


def _set_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """As TOML has them, without those that are not set."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping):
            found |= {key: inner} if (inner := _set_keys(value)) else {}
        elif value is not None:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def merged(base: Table, over: Table) -> Table:
    """`base` with the keys of `over` on top. Another family, objective, or type in a table does not inherit the base's options."""
    found = {section: dict(keys) for section, keys in base.items()}
    family = over.get("schedule", {}).get("family")
    if family is not None and family != found.get("schedule", {}).get("family", ScheduleConfig.family):
        for option in FAMILY_OPTIONS:
            found.get("schedule", {}).pop(option, None)
    if (objective := over.get("train", {}).get("objective")) in OBJECTIVES:
        for key in set(MASK_KEYS) - set(OBJECTIVES[objective]):
            found.get("train", {}).pop(key, None)
    for one, other in (("name", "path"), ("path", "name")):  # the one takes the other's place
        if one in over.get("model", {}) and other not in over.get("model", {}):
            found.get("model", {}).pop(other, None)
    if counted_anew(base, over):
        found.get("schedule", {}).pop("microbatches", None)
    for section, keys in over.items():
        mine = found.setdefault(section, {})
        for key, value in keys.items():
            inherits = isinstance(value, Mapping) and "type" not in value
            mine[key] = {**mine.get(key, {}), **value} if inherits else value
    return found


def build_config(table: Mapping[str, Any], ranks: int | None = None) -> Config:
    """A config from a table; raises ConfigError for a key, type, value or combination that cannot be.

    `ranks`: how many were started, for what follows from that; None when as many as the config says will be.
    """
    table = spread(_checked(table, ""), ranks)
    _check_asked(table)
    config = Config(**{name: _made(kind, table.get(name, {})) for name, kind in _sections().items()})
    check_config(config)
    return config


def _check_asked(table: Table) -> None:
    """Raise ConfigError where keys are open that the config asks for."""
    left = []
    for asked in table.get("run", {}).get("asks", ()):
        section, _, key = asked.partition(".")
        _field_type(section, key, "run.asks: ")
        left += [] if key in table.get(section, {}) else [asked]
    if left:
        raise ConfigError(
            f"{', '.join(left)}: left open by the config; give {'it' if len(left) == 1 else 'them'}, such as --{left[0]} VALUE"
        )


def _made(kind: Any, keys: Mapping[str, Any]) -> Any:
    """A dataclass from its keys, checked before."""
    hints = _hints(kind)
    values = {
        key: _made(hints[key], value)
        if isinstance(value, Mapping)
        else tuple(SourceConfig(**each) if isinstance(each, Mapping) else each for each in value)
        if isinstance(value, list)
        else value
        for key, value in keys.items()
    }
    return kind(**values)


class Arguments(NamedTuple):
    """What stood behind `helixpipe train`."""

    path: str | None
    """The config file."""
    overrides: Table


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """`[config.toml] [--section.key value ...] [--resume [PATH]]`, checked key by key; raises ConfigError."""
    path: str | None = None
    overrides: Table = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            if path is not None:
                raise ConfigError(
                    f"'{word}': one config file is enough, and '{path}' is given; write keys as --section.key value"
                )
            path = word
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == "resume":
            # a checkpoint is a folder: a TOML file after a bare --resume is the config
            bare = not equals and (not waiting or waiting[0].startswith("--") or waiting[0].endswith(".toml"))
            value: Any = "auto" if bare else (text if equals else waiting.pop(0))
            if not value:
                raise ConfigError(
                    "--resume: no path is given; name a run folder or a checkpoint, or write --resume alone"
                )
            overrides.setdefault("run", {})["resume"] = value
            continue
        if name in ("config", "config_file"):
            file = text or next((each for each in waiting[:1] if not each.startswith("--")), "FILE.toml")
            raise ConfigError(f"--{name.replace('_', '-')}: a config file has no flag; write {file} by itself")
        section, _, key = name.partition(".")
        kind = _field_type(section, key, "--")
        if not equals and not waiting:
            raise ConfigError(f"--{name}: no value; give {_expected(kind)}")
        words = [text] if equals else [waiting.pop(0)]
        if len(_pair(kind)) == 2 and "," not in words[0] and not equals and waiting:
            words.append(waiting.pop(0))
        *outer, last = key.split(".")
        inside: dict[str, Any] = overrides.setdefault(section, {})
        for each in outer:
            inside = inside.setdefault(each, {})
        inside[last] = _from_text(kind, ",".join(words), f"--{name}")
    return Arguments(path, overrides)


def _sections() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _field_type(section: str, key: str, where: str) -> Any:
    """The type of a key; raises ConfigError with the nearest one."""
    sections = _sections()
    if section not in sections:
        full = [f"{name}.{section}" for name, kind in sections.items() if section in typing.get_type_hints(kind)]
        if full and not key:
            raise ConfigError(f"{where}{section}: a key needs its section; did you mean '{where}{full[0]}'?")
        raise ConfigError(f"{where}{section}: no such section{nearest(section, sections)}")
    name, within, inner = key.partition(".")
    hints = _hints(sections[section])
    if f"{section}.{name}" in _REPLACED:
        raise ConfigError(f"{where}{section}.{name}: no such key any more; {_REPLACED[f'{section}.{name}']}")
    if name not in hints:
        raise ConfigError(f"{where}{section}.{name}: no such key{nearest(name, hints)}")
    kind = hints[name]
    if dataclasses.is_dataclass(kind) != bool(within):
        keys = ", ".join(_hints(kind)) if not within else ""
        raise ConfigError(
            f"{where}{section}.{key}: "
            + (f"a table; write {section}.{name}.KEY, one of {keys}" if keys else f"{name} is no table")
        )
    if within and inner not in _hints(kind):
        raise ConfigError(f"{where}{section}.{key}: no such key{nearest(inner, _hints(kind))}")
    return _hints(kind)[inner] if within else kind


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields; of one that may be unset, what it is when it is set."""
    return {key: _given(hint) for key, hint in typing.get_type_hints(kind, include_extras=True).items()}


def _given(kind: Any) -> Any:
    if kind != Sources and typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(choice for choice in typing.get_args(kind) if choice is not type(None))
    return kind


def _pair(kind: Any) -> tuple[Any, ...]:
    """The types of a tuple of so many values; nothing for one of any number, or for what is none."""
    inner = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    return () if Ellipsis in inner else inner


def _checked(table: Mapping[str, Any], where: str) -> Table:
    """The table with every key known and every value of its type."""
    found: Table = {}
    for section, keys in table.items():
        if section not in _sections():
            raise ConfigError(f"{where}{section}: no such section{nearest(section, _sections())}")
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{where}{section}: a section, not a value; write keys under [{section}]")
        for key, value in keys.items():
            if isinstance(value, Mapping):
                for inner, each in value.items():
                    kind = _field_type(section, f"{key}.{inner}", where)
                    found.setdefault(section, {}).setdefault(key, {})[inner] = _typed(
                        kind, each, f"{where}{section}.{key}.{inner}"
                    )
                continue
            kind = _field_type(section, key, where)
            found.setdefault(section, {})[key] = _typed(kind, value, f"{where}{section}.{key}")
    return found


def _typed(kind: Any, value: Any, where: str) -> Any:
    """The value, when it is of the type; an integer may stand for a float."""
    if _has_null_byte(value):
        raise ConfigError(f"{where}: {_shown(value)} has a null byte, which no path or name may have; leave it out")
    if kind == Sources:
        return typed_sources(value, where)
    if kind == OrAuto:
        return value if value == "auto" or type(value) is int else _refuse(kind, value, where)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            known = nearest(value, choices) if isinstance(value, str) else f"; known: {', '.join(choices)}"
            raise ConfigError(f"{where}: {_shown(value)} is not known{known}")
        return value
    if typing.get_origin(kind) is tuple:
        inner = _pair(kind) or (typing.get_args(kind)[0],) * (len(value) if isinstance(value, (list, tuple)) else 0)
        if isinstance(value, (list, tuple)) and len(value) == len(inner):
            return [_typed(each, item, where) for each, item in zip(inner, value, strict=True)]
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    _refuse(kind, value, where)


def _refuse(kind: Any, value: Any, where: str) -> NoReturn:
    raise ConfigError(f"{where}: {_shown(value)} will not do; give {_expected(kind)}") from None


def _has_null_byte(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_null_byte, value.values()))
    return (
        any(map(_has_null_byte, value)) if isinstance(value, list | tuple) else isinstance(value, str) and "\0" in value
    )


def _from_text(kind: Any, text: str, where: str) -> Any:
    """A value from the command line."""
    if kind == Sources:
        return sources_from_text(text, where)
    try:
        if kind in (int, float):
            return kind(text)
        if kind == OrAuto:
            return text if text == "auto" else int(text)
        if typing.get_origin(kind) is tuple:
            each = typing.get_args(kind)[0]
            return _typed(kind, [_from_text(each, item.strip(), where) for item in text.split(",") if item], where)
    except ValueError:
        _refuse(kind, text, where)
    if kind is bool and text in ("true", "false"):
        return text == "true"
    return _typed(kind, text, where)


def _expected(kind: Any) -> str:
    if kind == Sources:
        return "a path, or path:weight,path:weight"
    if kind == OrAuto:
        return "a whole number, or auto"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{len(_pair(kind))} numbers" if _pair(kind) else f"a list, each {_expected(typing.get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
