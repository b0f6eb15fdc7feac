"""The command line: a short function per command, over the public API. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from helixpipe import __version__
from helixpipe.errors import ConfigError, HelixpipeError, ScheduleError, nearest
from helixpipe.flags import Parser, add_family_options, flag, given_options, number, shown

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
that backward (I and W once each); messages take no time. Attention has that share of a layer at a sequence of 6 times the
hidden size (12 when causal); longer sequences have more.
"""
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
        told = re.sub(r"^schedule\.(\w+)", lambda key: "FAMILY" if key[1] == "family" else flag(key[1]), str(error))
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
    options = given_options(args)
    actions = 3 * max(args.ranks, args.microbatches * options.get("segments", 1) * (2 * args.layers + 1))
    if actions > MOST_ACTIONS:
        raise ConfigError(
            f"up to {actions:,} actions are more than show draws ({MOST_ACTIONS:,}); ask for fewer micro-batches, layers or ranks"
        )
    schedule = build_schedule(args.family, **sizes, **options)
    timeline = simulate_schedule(schedule, unit_durations(schedule))
    told = ", ".join(f"{name} {shown(value)}" for name, value in (sizes | options).items())
    theirs = None if args.torch_csv is None else to_torch_csv(schedule)  # refused before anything is written
    if args.svg is not None:
        write_text(args.svg, render(timeline, f"{args.family}: {told}", unit="units"))
    if args.csv is not None:
        write_text(args.csv, to_csv(schedule))
    if theirs is not None:
        write_text(args.torch_csv, theirs)
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


def _show_parser() -> Parser:
    from helixpipe.schedule.families import FAMILIES

    usage = "FAMILY --ranks P --layers L --microbatches M [options]"
    parser = Parser("show", usage, "A schedule as a staircase in the terminal, or as SVG, CSV, JSON.", SHOW)
    parser.add_argument("family", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--ranks", type=number, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--layers", type=number, required=True, metavar="L", help="layers of the model")
    parser.add_argument("--microbatches", type=number, required=True, metavar="M", help="micro-batches of a step")
    parser.add_argument("--svg", metavar="FILE", help="write a picture")
    parser.add_argument("--csv", metavar="FILE", help="write the schedule, a row a rank: helixpipe check reads it")
    theirs = "write it for torch.distributed.pipelining, in its compute_only format"
    parser.add_argument("--torch-csv", metavar="FILE", help=theirs)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_family_options(parser)
    return parser


def check(given: list[str]) -> int:
    """`helixpipe check FILE [--layers L]`"""
    from helixpipe.schedule.check import check as prove
    from helixpipe.schedule.text import load

    parser = Parser(
        "check", "FILE [options]", "Whether a schedule file can run, or the reason why not: exit code 2.", ""
    )
    parser.add_argument("file", metavar="FILE", help="a .csv or .json file, as show --csv writes it")
    layers = "layers of the model: for a compute_only .csv of torch.distributed.pipelining, which does not tell"
    parser.add_argument("--layers", type=number, metavar="L", help=layers)
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
    for count in range(len(told), 0, -1):
        line = "; ".join(told if count == len(told) else [*told[: count - 1], "...", told[-1]])
        if len(line) <= width:
            return line
    return f"{len(told)} stages: --json or --csv names their parts"


def _has_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _one_line(text: str) -> str:
    """Text without line breaks or control characters, whatever a file or an argument held."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
