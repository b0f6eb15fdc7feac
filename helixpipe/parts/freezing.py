"""Freezing: patterns over parameters' full names, of what is not trained.

embed*            shell patterns: * is anything, ? one character, [ab] one of these
layers.0-15.*     a piece between dots that is two numbers: layers 0 to 15, both included
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from helixpipe.errors import ConfigError
from helixpipe.parts.shape import ModelShape

_LAYERS = re.compile(r"(\d+)-(\d+)")


def freeze(shape: ModelShape, patterns: Sequence[str], key: str = "train.freeze") -> ModelShape:
    """The shape with all that any pattern names frozen. Raises ConfigError for a pattern that names nothing, or when
    nothing is left to train.
    """
    if not patterns:
        return shape
    names = shape.parameter_elements(shape.chain())
    expanded = [each for pattern in patterns for each in _expanded(pattern, names, key)]
    found = replace(shape, frozen=(*shape.frozen, *expanded))
    if not any(map(found.trains, names)):
        raise ConfigError(f"{key}: {', '.join(patterns)} are all parameters, and nothing is left to train; name fewer")
    return found


def _expanded(pattern: str, names: Collection[str], key: str) -> Iterable[str]:
    """Shell patterns of it, a range's one for each layer; each names some parameter."""
    pieces = pattern.split(".")
    place = next((i for i, piece in enumerate(pieces) if _LAYERS.fullmatch(piece)), None)
    choices = [pattern]
    if place is not None:
        first, last = map(int, pieces[place].split("-"))
        if first > last:
            raise ConfigError(f"{key}: '{pattern}' has layers {first} to {last}; give the lower one first")
        choices = [".".join([*pieces[:place], str(n), *pieces[place + 1 :]]) for n in range(first, last + 1)]
    for choice in choices:
        if not fnmatch.filter(names, choice):
            what = f"'{pattern}'" + (f" has '{choice}', which" if choice != pattern else "")
            raise ConfigError(f"{key}: {what} is no parameter; {_near(choice, names)}")
    return choices


def _near(pattern: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or [*names][:3]
    return f"the nearest are {', '.join(close)}"
