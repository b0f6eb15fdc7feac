"""The flags of the commands: a strict parser, and the families' options as flags, taken from their signatures."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn, get_args, get_type_hints

from helixpipe.errors import ConfigError, nearest
from helixpipe.schedule.families import FAMILIES, options

# an option of the families -> what its value is called, and what it is
OPTIONS = {
    "segments": ("K", "pieces of each sequence"),
    "stages_per_rank": ("V", "stages on each rank"),
    "group": (
        "G",
        "micro-batches (or segments of them) that take a stage together; 0 is the fewest that feed all ranks",
    ),
    "folds": ("N", "a group is N x P micro-batches: 1 is the naive order, 2 the two-fold"),
    "travel": ("T", "what moves with the attention: none, qkv or attention"),
    "groups": ("G", "one group after another, sequential, or all forwards first, forward_first"),
    "balance": ("B", "micro-batches take their places by number, or by the cost of their attention, work"),
    "work": ("W,W,...", "what each micro-batch's attention costs, in any unit, for --balance work"),
    "placement": ("P", "stages round the ranks, looped, there and back, v, or one a rank, line"),
    "memory": ("M", "what a rank's forwards may keep: 24GiB, or 1.5 times what one micro-batch leaves [ranks times]"),
    "tries": ("N", "runs against the clock that improve an order; 0 chooses"),
    "delay": ("D", "what a message is taken to be on its way, in forwards of a stage"),
    "costs": ("F,I,W", "times of a stage's F, I and W, which decide the order"),
    "opaque": ("L,L,...", "layers that are one block, which nothing can split"),
    "ends": ("E,H", "how many layers' work embed and head are"),
}

EVERYWHERE = ("vocabulary", "layers_per_stage")
"""Options that are of no family."""


class Parser(argparse.ArgumentParser):
    """Strict: no abbreviations, an unknown option names the nearest, and every fault is a ConfigError."""

    def __init__(self, command: str, usage: str, description: str, epilog: str) -> None:
        name = f"helixpipe {command}"
        super().__init__(name, f"{name} {usage}", description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """In our words: argparse's say what it expected, not what to write."""
        name, _, fault = message.removeprefix("argument ").partition(": ")
        if fault.startswith("expected"):
            raise ConfigError(f"{name}: no value follows; write {name}=VALUE if it starts with a dash")
        if name in ("the following arguments are required", "unrecognized arguments"):
            what = "missing" if name.endswith("required") else "not understood"
            raise ConfigError(f"{what}: {fault}; write {self.usage}, or see --help")
        raise ConfigError(f"{name}: {fault}" if fault else name)

    def read(self, given: list[str]) -> argparse.Namespace:
        known = sorted(name for action in self._actions for name in action.option_strings if name.startswith("--"))
        for word in given:
            name = word.split("=")[0]
            if re.match("-[-a-zA-Z]", name) and name not in (*known, "-h"):
                raise ConfigError(f"'{name}' is not an option of {self.prog}{nearest(name, known)}")
        try:
            return self.parse_args(given)
        except SystemExit as end:  # --help; flushed here so that a closed pipe is noticed
            sys.stdout.flush()
            raise end


def number(text: str) -> int:
    if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number below a billion")
    return int(text)


def decimal(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "b": 10**9, "t": 10**12}
_OF_A_CORPUS = {**_UNITS, "k": 10**3, "m": 10**6}


def amount(text: str, units: Mapping[str, int] = _UNITS) -> int:
    """A number as people write it: 4096, 128k, 4M. Lengths and batches are powers of two: k is 1,024, M its square."""
    match = re.fullmatch(r"(\d{1,15}|\d{1,9}\.\d{1,6})([kKmMbBtT]?)", text, re.ASCII)
    value = float(match[1]) * units[match[2].lower()] if match else -1.0
    if value < 0 or value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number, such as 4096, 128k, 4M or 100B")
    return int(value)


def corpus(text: str) -> int:
    """Tokens of a whole training, which are counted in tens: 500M is 500,000,000, 100B a hundred billion."""
    return amount(text, _OF_A_CORPUS)


def tokens(text: str) -> int:
    """Tokens of a sequence: as `amount`, below a billion."""
    value = amount(text)
    if value >= 10**9:
        raise argparse.ArgumentTypeError(f"'{text}' is not below a billion")
    return value


def _numbers(kind: type[int] | type[float], text: str) -> tuple[int | float, ...]:
    """`0,1.5` as numbers."""
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(f"'{text}' is not {numbers} with commas between them") from None


def flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def shown(value: Any) -> str:
    """A value as it is given on the command line."""
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def add_family_options(parser: Parser) -> None:
    own = parser.add_argument_group("options of the families")
    for name, kind in _family_options().items():
        metavar, meaning = OPTIONS.get(name, (name.upper(), ""))
        own.add_argument(flag(name), type=kind, metavar=metavar, help=f"{meaning} [{_who_has(name)}]")
    spread = "last, or spread: head and embedding divided by words over all ranks [all; default last]"
    own.add_argument("--vocabulary", metavar="V", help=spread)
    by_hand = "layers of each stage, in order [all but helix; default by cost]"
    own.add_argument("--layers-per-stage", type=partial(_numbers, int), metavar="L,L,...", help=by_hand)


def _family_options() -> dict[str, Callable[[str], Any]]:
    """Every option of any family -> what reads its value: from the families' own signatures."""
    single: dict[type, Callable[[str], Any]] = {int: number, float: decimal, str: str}
    found: dict[str, Callable[[str], Any]] = {}
    for family, function in FAMILIES.items():
        kinds = get_type_hints(function)
        for name in options(family):
            several = get_args(kinds[name])
            found[name] = partial(_numbers, several[0]) if several else single[kinds[name]]
    return {name: found[name] for name in (*OPTIONS, *found) if name in found}


def _who_has(option: str) -> str:
    """The families that have an option, and its default."""
    by_default: dict[str, list[str]] = {}
    for family, function in FAMILIES.items():
        if option in options(family):
            default = shown(inspect.signature(function).parameters[option].default) or "none"
            by_default.setdefault(default, []).append(family)
    without = [family for family in FAMILIES if option not in options(family)]
    if len(by_default) == 1 and 2 * len(without) < len(FAMILIES):
        return f"all but {', '.join(without)}; default {next(iter(by_default))}"
    return "; ".join(f"{', '.join(families)}: default {default}" for default, families in by_default.items())


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The family's own options that the command line has; raises ConfigError for another family's."""
    known = options(args.family)
    given = {name: value for name in _family_options() if (value := getattr(args, name)) is not None}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.7)
            has = f"which has {', '.join(map(flag, known))}" if known else "which has none"
            have = ", ".join(family for family in FAMILIES if name in options(family))
            advice = f"; did you mean '{flag(near[0])}'?" if near else f", {has}, but of {have}"
            raise ConfigError(f"{flag(name)}: not an option of {args.family}{advice}")
    return given | {name: value for name in EVERYWHERE if (value := getattr(args, name)) is not None}
