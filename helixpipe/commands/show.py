"""`helixpipe show FAMILY`"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys

from helixpipe.commands.facts import facts
from helixpipe.commands.pictures import add_picture_flags, write_pictures
from helixpipe.errors import ConfigError
from helixpipe.files import json_text, write_text
from helixpipe.flags import Parser, add_family_options, flag, given_options, number, shown
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.families import FAMILIES, build_schedule
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.text import to_csv, to_json
from helixpipe.schedule.torch_text import to_torch_csv
from helixpipe.view.text import staircase

SHOW = """\
The terminal shows one column an action, as if all took equally long. The SVG, makespan and bubble use
units for the parts of a layer: qkv 1, attention 3, mlp 2, everything else 0, a stage at least 1, and twice
that backward (I and W once each); messages take no time. Attention has that share of a layer at a sequence of 6 times the
hidden size (12 when causal); longer sequences have more.
"""
MOST_ACTIONS = 500_000


def show(given: list[str]) -> int:
    """`helixpipe show FAMILY ...`"""
    try:
        return _show(_show_parser().read(given))
    except ConfigError as error:  # the families name keys of a config
        told = re.sub(r"^schedule\.(\w+)", lambda key: "FAMILY" if key[1] == "family" else flag(key[1]), str(error))
        raise ConfigError(told) from None


def _show(args: argparse.Namespace) -> int:
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
    stages = tuple(map(str, schedule.stages))
    write_pictures(args, {"in units": timeline}, f"{args.family}: {told}", stages, unit="units")
    if args.csv is not None:
        write_text(args.csv, to_csv(schedule))
    if theirs is not None:
        write_text(args.torch_csv, theirs)
    peaks = [int(peak) for peak in peak_kept(schedule)]
    if args.json:
        modelled = {"makespan_units": timeline.makespan_s, "bubble_ratio": timeline.bubble_ratio}
        told_facts = {"family": args.family, "options": options} | facts(schedule) | modelled
        print(json_text(told_facts | {"peak_forwards": peaks, "schedule": json.loads(to_json(schedule))}))
        return 0
    width = shutil.get_terminal_size((120, 24)).columns
    print(f"{args.family}: {told}\n{_stages(schedule, width)}\n")
    print(staircase(schedule, width, color=_has_color()))
    most = str(max(peaks)) if len(set(peaks)) == 1 else f"{min(peaks)} to {max(peaks)}"
    print(f"in units (see --help): makespan {timeline.makespan_s:g}, bubble {100 * timeline.bubble_ratio:.1f}%")
    print(f"forwards kept at once, at most: {most} by rank")
    return 0


def _show_parser() -> Parser:
    usage = "FAMILY --ranks P --layers L --microbatches M [options]"
    parser = Parser("show", usage, "A schedule as a staircase in the terminal, or as SVG, CSV, JSON.", SHOW)
    parser.add_argument("family", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--ranks", type=number, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--layers", type=number, required=True, metavar="L", help="layers of the model")
    parser.add_argument("--microbatches", type=number, required=True, metavar="M", help="micro-batches of a step")
    add_picture_flags(parser)
    parser.add_argument("--csv", metavar="FILE", help="write the schedule, a row a rank: helixpipe check reads it")
    theirs = "write it for torch.distributed.pipelining, in its compute_only format"
    parser.add_argument("--torch-csv", metavar="FILE", help=theirs)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_family_options(parser)
    return parser


def _stages(schedule: Schedule, width: int) -> str:
    """What the stages are, on one line of at most `width` columns: the first ones and the last."""
    told = [f"stage {s}: {stage}" for s, stage in enumerate(schedule.stages)]
    for count in range(len(told), 0, -1):
        line = "; ".join(told if count == len(told) else [*told[: count - 1], "...", told[-1]])
        if len(line) <= width:
            return line
    return f"{len(told)} stages: --json or --csv names their parts"


def _has_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
