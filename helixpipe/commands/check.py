"""`helixpipe check FILE`"""

from __future__ import annotations

from helixpipe.commands.facts import facts
from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.files import json_text
from helixpipe.flags import Parser, number
from helixpipe.schedule.check import check as prove
from helixpipe.schedule.text import load

MOST_LAYERS = 100_000


def check(given: list[str]) -> int:
    """`helixpipe check FILE [--layers L]`"""
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
            print(json_text({"ok": False, "reason": error.reason} | place))
        raise
    known = facts(schedule)
    told = ", ".join(f"{name} {number}" for name, number in known.items())
    print(json_text({"ok": True} | known) if args.json else f"ok: {told}")
    return 0
