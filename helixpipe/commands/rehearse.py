"""`helixpipe rehearse FAMILY`"""

from __future__ import annotations

from typing import Any

from helixpipe.commands.setting import ONLY_RATIOS, duration, estimate_from, family_parser, options_told
from helixpipe.errors import ConfigError
from helixpipe.files import json_text
from helixpipe.flags import decimal, given_options
from helixpipe.predict.timeline import Timeline

ABOUT = (
    "Run a schedule on this machine with the real runtime and real messages: a process a rank, which sleep for the time\
 that simulate predicts."
)
EPILOG = """\
The step is scaled to last --seconds. A ratio above 1 is what starting actions, messages of a few bytes and this machine's
other work add; the order of instructions is that of the program, or the exit code is 1.
"""
MOST_RANKS = 256
MOST_ROWS = 16
# a wait for another rank may be as long as the step; a rank that is late by more than this is lost
LATE_S = 60.0


def rehearse(given: list[str]) -> int:
    """`helixpipe rehearse FAMILY ...`"""
    parser = family_parser("rehearse", ABOUT, EPILOG)
    parser.add_argument("--seconds", type=decimal, default=20.0, metavar="S", help="how long the step is to last [20]")
    args = parser.read(given)
    if not args.seconds > 0:
        raise ConfigError(f"--seconds: {args.seconds:g}; give more than 0")
    if args.ranks > MOST_RANKS:
        raise ConfigError(
            f"--ranks: {args.ranks} processes are more than one machine is asked for; give at most {MOST_RANKS}"
        )
    estimate = estimate_from(args)
    scale = args.seconds / estimate.timeline.makespan_s
    from helixpipe.runtime import emulated

    measured = emulated.rehearse(
        estimate.program,
        lambda action: scale * estimate.seconds(action),
        lambda message: scale * estimate.message_seconds(message),
        timeout_s=args.seconds + LATE_S,
        communicators=estimate.setting.link.communicators,
    )
    setting = estimate.setting
    is_equal = measured.order == estimate.schedule.ranks
    result = _result(estimate.timeline, measured, scale) | {"order_equal": is_equal, "only_ratios": setting.only_ratios}
    if args.json:
        print(json_text({"family": args.family, "options": given_options(args)} | result))
    else:
        options = options_told(given_options(args))
        print(
            f"{args.family}{', ' * bool(options)}{options}: {args.ranks} ranks, {args.microbatches} micro-batches; "
            f"{setting.machine}, link {setting.link.name}"
        )
        print(
            f"a step of {duration(estimate.timeline.makespan_s)}, in {duration(args.seconds)}: times below are x {scale:.4g}"
        )
        if setting.only_ratios:
            print(ONLY_RATIOS)
        print(f"instruction order {'equal' if is_equal else 'NOT equal'} on every rank" + "\n")
        print("\n".join(_table(result)))
    return 0 if is_equal else 1


def _result(simulated: Timeline, measured: Timeline, scale: float) -> dict[str, Any]:
    """Both timelines in the seconds that the rehearsal took."""
    ranks = [
        {
            "rank": rank,
            "simulated_busy_s": scale * simulated.busy_s[rank],
            "rehearsed_busy_s": measured.busy_s[rank],
            "simulated_idle_s": scale * simulated.idle_s[rank],
            "rehearsed_idle_s": measured.idle_s[rank],
        }
        for rank in range(simulated.ranks)
    ]
    expected_s = scale * simulated.makespan_s
    return {
        "scale": scale,
        "simulated_makespan_s": expected_s,
        "rehearsed_makespan_s": measured.makespan_s,
        "ratio": measured.makespan_s / expected_s,
        "ranks": ranks,
    }


def _table(result: dict[str, Any]) -> list[str]:
    """The step, then a row a rank; of many ranks the first and the last ones."""
    lines = [
        f"{'':8}  {'simulated':>21}  {'rehearsed':>21}",
        f"{'step':8}  {result['simulated_makespan_s']:19.3f} s  {result['rehearsed_makespan_s']:19.3f} s  ratio {result['ratio']:.4f}",
        f"{'':8}  {'busy':>9}  {'idle':>10}  {'busy':>9}  {'idle':>10}",
    ]
    rows = [
        f"rank {row['rank']:<3}  {row['simulated_busy_s']:9.3f}  {row['simulated_idle_s']:10.3f}  "
        f"{row['rehearsed_busy_s']:9.3f}  {row['rehearsed_idle_s']:10.3f}"
        for row in result["ranks"]
    ]
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS // 2], "...", *rows[-MOST_ROWS // 2 :]]
    return lines + rows
