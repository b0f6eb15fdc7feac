"""The command line: a short function per command, over the public API. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn, get_args, get_type_hints

from helixpipe import __version__
from helixpipe.errors import ConfigError, HelixpipeError, ScheduleError, nearest

USAGE = """\
usage: helixpipe COMMAND [options]

  train   train a model: helixpipe train [config.toml] [--section.key value ...]
  show    a schedule as a staircase in the terminal, or as SVG, CSV, JSON
  check   whether a schedule file can run, or the reason why not

helixpipe COMMAND --help tells a command's options; helixpipe --version the version.
"""
SHOW = """\
The terminal shows one column an action, as if all took equally long. The SVG, makespan and bubble use
units for the parts of a layer: qkv 1, attention 3, mlp 2, everything else 0, a stage at least 1, and twice
that backward; messages take no time. Attention has that share of a layer at a sequence of 6 times the
hidden size (12 when causal); longer sequences have more.
"""
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
    "costs": ("F,I,W", "times of a stage's F, I and W, which decide the order"),
    "opaque": ("L,L,...", "layers that are one block, which nothing can split"),
    "ends": ("E,H", "how many layers' work embed and head are"),
}
MOST_ACTIONS = 500_000
MOST_LAYERS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _command(given)
        sys.stdout.flush()
        return code
    except HelixpipeError as error:
        print(f"helixpipe: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has enough; nothing more may be written, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _command(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    if given[0] == "--version":
        print(f"helixpipe {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {"train": train, "show": show, "check": check}
    if given[0] not in commands:
        raise ConfigError(f"'{given[0]}' is not a command{nearest(given[0], commands)}")
    return commands[given[0]](given[1:])


def train(given: list[str]) -> int:
    """`helixpipe train ...`"""
    from helixpipe.train import main as run

    return run(given)


def show(given: list[str]) -> int:
    """`helixpipe show FAMILY ...`"""
    try:
        return _show(_show_parser().read(given))
    except ConfigError as error:  # the families name keys of a config
        told = re.sub(r"^schedule\.(\w+)", lambda key: "FAMILY" if key[1] == "family" else _flag(key[1]), str(error))
        raise ConfigError(told) from None


def _show(args: argparse.Namespace) -> int:
    from helixpipe.files import write_text
    from helixpipe.predict.peak import peak_kept
    from helixpipe.predict.simulate import simulate_schedule
    from helixpipe.schedule.families import build_schedule
    from helixpipe.schedule.text import to_csv, to_json
    from helixpipe.schedule.torch_text import to_torch_csv
    from helixpipe.view.svg import render
    from helixpipe.view.text import staircase
    from helixpipe.view.units import unit_durations

    sizes = {"ranks": args.ranks, "layers": args.layers, "microbatches": args.microbatches}
    options = _given_options(args)
    actions = 3 * max(args.ranks, args.microbatches * options.get("segments", 1) * (2 * args.layers + 1))
    if actions > MOST_ACTIONS:
        raise ConfigError(
            f"up to {actions:,} actions are more than show draws ({MOST_ACTIONS:,}); ask for fewer micro-batches, layers or ranks"
        )
    schedule = build_schedule(args.family, **sizes, **options)
    timeline = simulate_schedule(schedule, unit_durations(schedule))
    told = ", ".join(f"{name} {_shown(value)}" for name, value in (sizes | options).items())
    if args.svg is not None:
        write_text(args.svg, render(timeline, f"{args.family}: {told}", unit="units"))
    if args.csv is not None:
        write_text(args.csv, to_csv(schedule))
    if args.torch_csv is not None:
        write_text(args.torch_csv, to_torch_csv(schedule))
    peaks = [int(peak) for peak in peak_kept(schedule)]
    if args.json:
        modelled = {"makespan_units": timeline.makespan_s, "bubble_ratio": timeline.bubble_ratio}
        facts = {"family": args.family, "options": options} | _facts(schedule) | modelled
        print(json.dumps(facts | {"peak_forwards": peaks, "schedule": json.loads(to_json(schedule))}))
        return 0
    width = shutil.get_terminal_size((120, 24)).columns
    print(f"{args.family}: {told}\n{_stages(schedule, width)}\n")
    print(staircase(schedule, width, color=_has_color()))
    most = str(max(peaks)) if len(set(peaks)) == 1 else f"{min(peaks)} to {max(peaks)}"
    print(f"in units (see --help): makespan {timeline.makespan_s:g}, bubble {100 * timeline.bubble_ratio:.1f}%")
    print(f"forwards kept at once, at most: {most} by rank")
    return 0


def _show_parser() -> _Parser:
    from helixpipe.schedule.families import FAMILIES

    usage = "FAMILY --ranks P --layers L --microbatches M [options]"
    parser = _Parser("show", usage, "A schedule as a staircase in the terminal, or as SVG, CSV, JSON.", SHOW)
    parser.add_argument("family", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--ranks", type=_number, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--layers", type=_number, required=True, metavar="L", help="layers of the model")
    parser.add_argument("--microbatches", type=_number, required=True, metavar="M", help="micro-batches of a step")
    parser.add_argument("--svg", metavar="FILE", help="write a picture")
    parser.add_argument("--csv", metavar="FILE", help="write the schedule, a row a rank: helixpipe check reads it")
    theirs = "write it for torch.distributed.pipelining, in its compute_only format"
    parser.add_argument("--torch-csv", metavar="FILE", help=theirs)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    own = parser.add_argument_group("options of the families")
    for name, kind in _family_options().items():
        metavar, meaning = OPTIONS.get(name, (name.upper(), ""))
        own.add_argument(_flag(name), type=kind, metavar=metavar, help=f"{meaning} [{_who_has(name)}]")
    return parser


def _family_options() -> dict[str, Callable[[str], Any]]:
    """Every option of any family -> what reads its value: from the families' own signatures."""
    from helixpipe.schedule.families import FAMILIES, options

    single: dict[type, Callable[[str], Any]] = {int: _number, str: str}
    found: dict[str, Callable[[str], Any]] = {}
    for family, function in FAMILIES.items():
        kinds = get_type_hints(function)
        for name in options(family):
            several = get_args(kinds[name])
            found[name] = partial(_numbers, several[0]) if several else single[kinds[name]]
    return {name: found[name] for name in (*OPTIONS, *found) if name in found}


def _who_has(option: str) -> str:
    """The families that have an option, and its default."""
    from helixpipe.schedule.families import FAMILIES, options

    by_default: dict[str, list[str]] = {}
    for family, function in FAMILIES.items():
        if option in options(family):
            default = _shown(inspect.signature(function).parameters[option].default) or "none"
            by_default.setdefault(default, []).append(family)
    without = [family for family in FAMILIES if option not in options(family)]
    if len(by_default) == 1 and 2 * len(without) < len(FAMILIES):
        return f"all but {', '.join(without)}; default {next(iter(by_default))}"
    return "; ".join(f"{', '.join(families)}: default {default}" for default, families in by_default.items())


def _given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The family's own options that the command line has; raises ConfigError for another family's."""
    from helixpipe.schedule.families import FAMILIES, options

    known = options(args.family)
    given = {name: value for name in _family_options() if (value := getattr(args, name)) is not None}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.7)
            has = f"which has {', '.join(map(_flag, known))}" if known else "which has none"
            have = ", ".join(family for family in FAMILIES if name in options(family))
            advice = f"; did you mean '{_flag(near[0])}'?" if near else f", {has}, but of {have}"
            raise ConfigError(f"{_flag(name)}: not an option of {args.family}{advice}")
    return given


def check(given: list[str]) -> int:
    """`helixpipe check FILE [--layers L]`"""
    from helixpipe.schedule.check import check as prove
    from helixpipe.schedule.text import load

    parser = _Parser(
        "check", "FILE [options]", "Whether a schedule file can run, or the reason why not: exit code 2.", ""
    )
    parser.add_argument("file", metavar="FILE", help="a .csv or .json file, as show --csv writes it")
    layers = "layers of the model: for a compute_only .csv of torch.distributed.pipelining, which does not tell"
    parser.add_argument("--layers", type=_number, metavar="L", help=layers)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.read(given)
    if args.layers is not None and not 0 < args.layers <= MOST_LAYERS:
        raise ConfigError(f"--layers: {args.layers}; give 1 to {MOST_LAYERS:,}")
    try:
        schedule = load(args.file, args.layers)
        prove(schedule)
    except ScheduleError as error:
        if args.json:
            place = {"rank": error.rank, "position": error.position, "action": error.action}
            print(json.dumps({"ok": False, "reason": error.reason} | place))
        raise
    facts = _facts(schedule)
    told = ", ".join(f"{name} {number}" for name, number in facts.items())
    print(json.dumps({"ok": True} | facts) if args.json else f"ok: {told}")
    return 0


class _Parser(argparse.ArgumentParser):
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


def _number(text: str) -> int:
    if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number below a billion")
    return int(text)


def _numbers(kind: type[int] | type[float], text: str) -> tuple[int | float, ...]:
    """`0,1.5` as numbers."""
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(f"'{text}' is not {numbers} with commas between them") from None


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _shown(value: Any) -> str:
    """A value as it is given on the command line."""
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def _facts(schedule: Any) -> dict[str, int]:
    return {
        "ranks": len(schedule.ranks),
        "stages": len(schedule.stages),
        "layers": schedule.layers,
        "microbatches": schedule.microbatches,
        "actions": sum(map(len, schedule.ranks)),
    }


def _stages(schedule: Any, width: int) -> str:
    """What the stages are, on one line of at most `width` columns: the first ones and the last."""
    told = [f"stage {s}: {stage}" for s, stage in enumerate(schedule.stages)]
    for shown in range(len(told), 0, -1):
        line = "; ".join(told if shown == len(told) else [*told[: shown - 1], "...", told[-1]])
        if len(line) <= width:
            return line
    return f"{len(told)} stages: --json or --csv names their parts"


def _has_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _one_line(text: str) -> str:
    """Text without line breaks or control characters, whatever a file or an argument held."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
