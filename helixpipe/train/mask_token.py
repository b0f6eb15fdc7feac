"""The mask token of objectives that mask: a config's, or the one that its data's or its model's tokenizer names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from helixpipe.config import Config
from helixpipe.errors import ConfigError

# where a tokenizer names its special tokens, the first goes before
_NAMING = ("special_tokens_map.json", "tokenizer_config.json")


def with_mask_token(config: Config) -> Config:
    """The config with its mask token written down, so that all ranks, and a run that goes on, have one. Raises ConfigError."""
    if config.train.objective == "next_token":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, mask_token=mask_token(config)))


def mask_token(config: Config) -> int:
    """Its id. Raises ConfigError where there is none, or none that the model's vocabulary has."""
    given, vocabulary = config.train.mask_token, config.shape().vocabulary
    source = ""
    if given is None:
        folders = [Path(each.path, "tokenizer") for each in config.data.sources if each.path]
        folders += [Path(config.model.path)] if config.model.path else []
        found = [(folder, named) for folder in folders if (named := _named_by(folder)) is not None]
        if not found:
            raise ConfigError(
                f"train.mask_token: {config.train.objective} needs one, and neither data.path nor model.path has a tokenizer that "
                "names its mask_token; give an id that the data does not have (of text read as bytes: 255)"
            )
        folder, given = found[0]
        source = f" of the tokenizer in '{folder}'"
    if not 0 <= given < vocabulary:
        raise ConfigError(
            f"train.mask_token: {given}{source} does not fit a vocabulary of {vocabulary}; "
            "give another, or raise model.vocabulary"
        )
    return given


def _named_by(folder: Path) -> int | None:
    """The id of the mask token that a tokenizer's files name, None where they name none."""
    for file in _NAMING:
        named = _json(folder / file).get("mask_token")
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str):
            tokenizer = _json(folder / "tokenizer.json")
            added = [each for each in tokenizer.get("added_tokens") or [] if each.get("content") == named]
            words = (tokenizer.get("model") or {}).get("vocab")
            known = words.get(named) if isinstance(words, dict) else None
            return int(added[0]["id"]) if added else known
    return None


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
