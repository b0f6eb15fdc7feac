"""The section [data]: sources of tokens, one or several with weights, and how sequences are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from helixpipe.errors import ConfigError, nearest


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    path: str
    weight: float = 1.0
    """Of the sequences of a run, the share of this source is its weight over the sum of all."""


Sources = str | tuple[SourceConfig, ...]
_EXPECTED = 'give a path, or a list of paths or of tables {path = "...", weight = 2}'


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    path: Sources = ""
    """A folder that helixpipe prepare wrote, .npy/.bin tokens, or a text file or a folder of them (bytes are tokens); "" is Python's standard library. What is neither is refused by name. Several sources by weight: a list of tables {path = "...", weight = 2} in a file, path:weight,path:weight on the command line."""
    held_out: float = 0.1
    """The share never trained on: the tail of the tokens; 0 is none."""
    dtype: Literal["uint16", "uint32"] | None = None
    """What a .bin file holds: left out, what Megatron's .idx beside it says, or else uint16."""
    packing: Literal["windows", "documents", "balanced"] = "windows"
    """What a sequence is: a window of continuous text, or whole documents put together; balanced: so that the micro-batches of a
    step cost the same. Each window or document comes once an epoch, in an order that the seed decides."""
    longest: Literal["cut", "drop"] = "cut"
    """A document that is longer than a sequence: cut into several, or never read."""
    look_ahead: int = 16
    """balanced: steps whose sequences are dealt among them; more balance better, and move documents further."""
    document_mask: bool | None = None
    """Whether attention and positions keep to each document; unset: where whole documents are packed."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources, one or several."""
        return (SourceConfig(self.path),) if isinstance(self.path, str) else self.path

    @property
    def masks_documents(self) -> bool:
        """Whether attention keeps to each document."""
        return self.packing != "windows" if self.document_mask is None else self.document_mask


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
