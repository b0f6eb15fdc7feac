"""`helixpipe simulate FAMILY`"""

from __future__ import annotations

from typing import Any

from helixpipe.commands.documents import add_data_flags, data_from
from helixpipe.commands.pictures import add_picture_flags, write_pictures
from helixpipe.commands.setting import (
    ONLY_RATIOS,
    duration,
    estimate_from,
    family_parser,
    gibibytes,
    holding_told,
    options_told,
)
from helixpipe.commands.simulated_steps import Steps, simulate_steps, steps_as_json, steps_table
from helixpipe.files import json_text
from helixpipe.flags import given_options
from helixpipe.parts.part import vocabulary_shards
from helixpipe.predict.estimate import Estimate
from helixpipe.predict.explain import Reason, critical_path, idle_by_reason
from helixpipe.predict.holding import holding

ABOUT = "Predicted time, bubble and memory of a schedule, per rank, from the program that training would run."
EPILOG = """\
ideal is the step if ranks shared the work evenly, never waited and recomputed nothing. Idle time: warm-up before a rank's
first layer and drain after its last one; imbalance, while another rank is at what it needs, shards where that is of a spread
vocabulary; message, while that travels.
With --data each of the first --steps steps of a run is priced with the very documents that training would read, and cut by
them; a step lasts as long as its slowest --dp replica. The table and pictures are of the step nearest to the median.
"""
MOST_ROWS = 16
STEPS = 20


def simulate(given: list[str]) -> int:
    """`helixpipe simulate FAMILY ...`"""
    parser = family_parser("simulate", ABOUT, EPILOG)
    add_data_flags(parser, STEPS)
    add_picture_flags(parser)
    args = parser.read(given)
    read = data_from(args, STEPS)
    steps = None if read is None else simulate_steps(args, read)
    estimate = estimate_from(args) if steps is None else steps.shown
    title = f"{args.family} on {args.ranks} ranks: {args.model} at {args.sequence_length:,} tokens, predicted"
    title += "" if steps is None else f" ({steps.told})"
    stages = tuple(map(str, estimate.schedule.stages))
    write_pictures(args, {"predicted": estimate.timeline}, title, stages, _facts(estimate, steps))
    if args.json:
        told = {"family": args.family, "options": given_options(args)} | as_json(estimate)
        print(json_text(told if steps is None else told | {"data": steps_as_json(steps)}))
        return 0
    print("\n".join(steps_table(steps) if steps else []), end="\n" if steps else "")
    print(_head(args.family, given_options(args), estimate))
    print("\n".join(table(estimate)))
    return 0


def _facts(estimate: Estimate, steps: Steps | None) -> list[tuple[str, str]]:
    """What the page's head tells."""
    setting, timeline = estimate.setting, estimate.timeline
    data = [] if steps is None else [("data", str(steps.data.path)), ("shown", steps.told)]
    return [
        *data,
        ("step", duration(estimate.step_s)),
        ("of ideal", f"{estimate.step_s / estimate.ideal_s:.4f}"),
        ("bubble", f"{timeline.bubble_ratio:.1%}"),
        ("tokens/s", f"{estimate.tokens_per_s:,.0f}"),
        ("hardware", setting.machine + ": only ratios mean anything" * setting.only_ratios),
        ("link", setting.link.name),
        ("recompute", setting.keeping.recompute),
    ]


def as_json(estimate: Estimate) -> dict[str, Any]:
    """What is predicted, as plain data."""
    timeline, setting = estimate.timeline, estimate.setting
    reasons = idle_by_reason(estimate.program, timeline)
    ranks = [
        {
            "rank": rank,
            "busy_s": timeline.busy_s[rank],
            "idle_s": timeline.idle_s[rank],
            "idle_by_reason_s": reasons[rank],
            "peak_activation_bytes": timeline.peak_activation_bytes[rank],
            "peak_transit_bytes": timeline.peak_transit_bytes[rank],
            **timeline.standing[rank]._asdict(),
            "peak_bytes": timeline.peak_bytes[rank],
        }
        for rank in range(timeline.ranks)
    ]
    return {
        "makespan_s": timeline.makespan_s,
        "ideal_s": estimate.ideal_s,
        "bubble_ratio": timeline.bubble_ratio,
        "reduction_s": estimate.reduction_s,
        "step_s": estimate.step_s,
        "tokens_per_s": estimate.tokens_per_s,
        "hardware": setting.machine,
        "only_ratios": setting.only_ratios,
        "link": setting.link.name,
        "holding": (held := holding(estimate)) and held._asdict(),
        "segment_lengths": list(estimate.program.batches[0].segment_lengths),
        "ranks": ranks,
    }


def table(estimate: Estimate) -> list[str]:
    """A row a rank; of many ranks the first and the last ones."""
    timeline = estimate.timeline
    reasons = idle_by_reason(estimate.program, timeline)
    spread = vocabulary_shards(part for stage in estimate.schedule.stages for part in stage.parts)
    names = [reason for reason in Reason if reason is not Reason.RUNTIME and (spread or reason is not Reason.SHARDS)]
    head = f"{'rank':>4}  {'busy':>9}  {'idle':>9}  " + "  ".join(f"{name.replace('_', '-'):>9}" for name in names)
    lines = [head + f"  {'activations':>12}  {'all bytes':>10}"]
    many = timeline.ranks > MOST_ROWS
    shown = (
        [*range(MOST_ROWS // 2), *range(timeline.ranks - MOST_ROWS // 2, timeline.ranks)]
        if many
        else range(timeline.ranks)
    )
    for rank in shown:
        if many and rank == timeline.ranks - MOST_ROWS // 2:
            lines.append(f"{'...':>4}")
        idle = "  ".join(f"{duration(reasons[rank][name]) if reasons[rank][name] > 1e-9 else '-':>9}" for name in names)
        lines.append(
            f"{rank:>4}  {duration(timeline.busy_s[rank]):>9}  {duration(timeline.idle_s[rank]):>9}  {idle}  "
            f"{gibibytes(timeline.peak_activation_bytes[rank]):>12}  {gibibytes(timeline.peak_bytes[rank]):>10}"
        )
    return [*lines, *_path(estimate)]


def _head(family: str, options: dict[str, Any], estimate: Estimate) -> str:
    setting, timeline = estimate.setting, estimate.timeline
    told = f", {options_told(options)}" if options else ""
    step = f"step {duration(estimate.step_s)}, {estimate.step_s / estimate.ideal_s:.4f} of ideal {duration(estimate.ideal_s)}"
    ending = "sum gradients" + (" and send updates" if setting.optimizer == "sharded" else "")
    step += f"; {duration(estimate.reduction_s)} of it to {ending}" if estimate.reduction_s else ""
    note = f"{ONLY_RATIOS}\n" if setting.only_ratios else ""
    return (
        f"{family}{told}: {timeline.ranks} ranks, {estimate.schedule.microbatches} micro-batches of "
        f"{setting.microbatch_size} x {setting.sequence_length:,} tokens; {setting.machine}, link {setting.link.name}\n"
        f"{step}; bubble {timeline.bubble_ratio:.1%}; {estimate.tokens_per_s:,.0f} tokens/s\n{note}"
    )


def _path(estimate: Estimate) -> list[str]:
    """Where the longest chain of actions spends its time."""
    path = critical_path(estimate.program, estimate.timeline)
    by_rank: dict[int, float] = {}
    for step in path:
        by_rank[step.rank] = by_rank.get(step.rank, 0.0) + step.span.end_s - step.span.start_s
    most = sorted(by_rank.items(), key=lambda item: -item[1])[:3]
    share = estimate.timeline.makespan_s or 1.0
    told = ", ".join(f"rank {rank} {seconds / share:.0%}" for rank, seconds in most)
    travels = max(0.0, 1 - sum(by_rank.values()) / share)
    lines = ["", f"critical path: {len(path)} actions, {told}; messages {travels:.0%}"]
    return lines + ([f"held back by {holding_told(held)}"] if (held := holding(estimate)) else [])
