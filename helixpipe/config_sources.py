"""The key data.path: one source of tokens, or several with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helixpipe.errors import ConfigError, nearest


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    path: str
    weight: float = 1.0
    """Of the sequences of a run, the share of this source is its weight over the sum of all."""


Sources = str | tuple[SourceConfig, ...]
_EXPECTED = 'give a path, or a list of paths or of tables {path = "...", weight = 2}'


def typed_sources(value: Any, where: str) -> str | list[dict[str, Any]]:
    """As a config has it: a text as it is, a list as tables of path and weight. Raises ConfigError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{where}: {value!r} will not do; {_EXPECTED}")
    return [_table(each, f"{where}: source {number}") for number, each in enumerate(value, start=1)]


def _table(given: Any, where: str) -> dict[str, Any]:
    if isinstance(given, str):
        given = {"path": given}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; {_EXPECTED}")
    for key in given:
        if key not in ("path", "weight"):
            raise ConfigError(f"{where}: {key}: no such key{nearest(key, ('path', 'weight'))}")
    path, weight = given.get("path", ""), given.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise ConfigError(f'{where} has no path; write {{path = "...", weight = ...}}')
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ConfigError(f"{where}, '{path}', has weight {weight}; give a number above 0, or leave the source out")
    return {"path": path, "weight": float(weight)}


def sources_from_text(text: str, where: str) -> str | list[dict[str, Any]]:
    """From the command line: `path`, or `path:weight,path:weight`, where `:weight` may be left out. Raises ConfigError."""
    if "," not in text:
        return text
    found = []
    for word in text.split(","):
        path, colon, number = word.rpartition(":")
        try:
            found.append({"path": path, "weight": float(number)} if colon else {"path": word})
        except ValueError:  # a colon of the path's own
            found.append({"path": word})
    return typed_sources(found, where)
