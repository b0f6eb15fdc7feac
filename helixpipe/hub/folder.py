"""Folder: a Hugging Face model on disk, as far as it can be known without reading a weight.

config.json ──► architecture, shape          file headers ──► where every parameter is, or what is wrong with them
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError
from helixpipe.files import fault
from helixpipe.hub.architecture import Architecture, Place
from helixpipe.hub.headers import DTYPES, Stored, is_there, read_json, stored_in
from helixpipe.hub.known import architecture_of
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES, named_shape

CONFIG = "config.json"
_TABLE = "embed.tokens.weight"
MAY_CHANGE = (
    "rope", "rope_base", "window_rope_base", "window", "window_pattern", "norm_eps", "softcap", "head_softcap",
    "attention_scale", "causal", "context",
)  # fmt: skip
"""Fields that say how weights are used; all others are decided by the weights."""


class Source(NamedTuple):
    """Where a parameter's values are."""

    stored: Stored
    place: Place
    twin: Stored | None = None
    """A tied head's table, stored once more."""
    key: str = "model.path"
    """The key of the config that names its folder."""


@dataclass(frozen=True)
class Folder:
    """A folder, or a config.json alone."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: ModelShape

    @staticmethod
    def open(path: str | Path) -> Folder:
        """Raises ConfigError for a folder that has no config, or one that asks for what there is not here."""
        path = Path(path)
        if why := fault(path):
            raise ConfigError(f"model.path: {path}: {why}; give a folder with a {CONFIG}")
        file = path / CONFIG if path.is_dir() else path
        if not file.is_file():
            what = f"no {CONFIG} in it" if path.is_dir() else "no such file or folder"
            raise ConfigError(f"model.path: {path}: {what}; give a folder that transformers' save_pretrained wrote")
        try:
            config = read_json(file)
        except ConfigError as error:
            raise ConfigError(f"model.path: {error}") from None
        try:
            architecture = architecture_of(config)
            return Folder(file.parent, config, architecture, architecture.read(config))
        except ConfigError as error:
            raise ConfigError(f"model.path: {file}: {error}") from None

    def changed(self, changes: Mapping[str, Any]) -> ModelShape:
        """The shape with some fields changed; raises ConfigError for one that the weights decide."""
        for name, value in changes.items():
            fixed = name not in MAY_CHANGE or (name == "context" and self.shape.positions == "learned")
            if fixed and value != getattr(self.shape, name):
                raise ConfigError(
                    f"model.{name}: {value}, and the weights in model.path are of {getattr(self.shape, name)}; "
                    f"leave it out: only {', '.join(MAY_CHANGE)} may differ"
                )
        if changes.get("window") == 0:  # in no layer
            changes = {"window_pattern": ()} | dict(changes)
        return dataclasses.replace(self.shape, **changes)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Full name of every parameter -> where it is. Raises ConfigError for a tensor that is missing, not known or of
        another size than the config says.
        """
        try:
            return _matched(self.architecture, self.shape, stored_in(self.path), self.path)
        except ConfigError as error:
            raise ConfigError(f"model.path: {error}") from None


def model_shape(name: str, **changes: Any) -> ModelShape:
    """The shape of a name, of a folder or of a config.json, with some fields changed; raises ConfigError."""
    if name not in SHAPES and is_there(name):
        return Folder.open(name).changed(changes)
    return named_shape(name, **changes)


def _matched(
    architecture: Architecture, shape: ModelShape, stored: Mapping[str, Stored], where: Path
) -> dict[str, Source]:
    prefix, places = architecture.prefix, architecture.places(shape)
    bare = not any(name.startswith(prefix) for name in stored)

    def called(name: str) -> str:
        return name.removeprefix(prefix) if bare else name

    twin = stored.get(architecture.tied) if shape.tied else None
    found: dict[str, Source] = {}
    missing = []
    for ours, place in places.items():
        line = stored.get(called(place.tensor))
        if line is None:
            missing.append(called(place.tensor))
            continue
        if line.size != place.size:
            raise ConfigError(
                f"{line.file}: {line.name} is {list(line.size)}, and {CONFIG} says {list(place.size)}; "
                "give the config that belongs to these weights"
            )
        if line.dtype not in DTYPES:
            raise ConfigError(
                f"{line.file}: {line.name} is {line.dtype}; known: {', '.join(DTYPES)}: save it with whole weights"
            )
        found[ours] = Source(line, place, twin if ours == _TABLE else None)
    if missing:
        headless = missing == [architecture.tied]
        advice = "save the model with its head, not its base model alone" if headless else "fetch the folder again"
        raise ConfigError(f"{where}: {missing[0]} is missing{_more(missing)}; {advice}")
    if twin is not None and twin.size != found[_TABLE].place.size:
        raise ConfigError(
            f"{twin.file}: {twin.name} is {list(twin.size)}, and tie_word_embeddings says that it is the embedding's "
            f"table of {list(found[_TABLE].place.size)}; give the config that belongs to these weights"
        )
    known = {source.stored.name for source in found.values()} | ({architecture.tied} if shape.tied else set())
    extra = [name for name in stored if name not in known and not re.fullmatch(architecture.buffers, name)]
    if extra:
        raise ConfigError(
            f"{stored[extra[0]].file}: {extra[0]} is no tensor of {architecture.name}{_more(extra)}; "
            "give a model of this architecture alone"
        )
    return found


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
