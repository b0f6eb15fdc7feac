"""Rehearsals against simulations, and against torch.distributed.pipelining. `python benchmarks/rehearsal/run.py`

8 ranks, 16 micro-batches of 131,072 tokens, the 7B shape, every FLOP at one rate, messages free, nothing recomputed;
all times scaled so that a simulated 1F1B step lasts --seconds (with kernels of an H100 it lasts 125 s). Ours: the real executor, transport and processes, with
actions that sleep. torch's: its own schedules and runtime, with modules whose forward and backward sleep the same. Then
64 ranks, to see that they run. Peak activations are predicted, by the same formula for both sides' orders.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from incumbent import TorchStep
from peers import machine

from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Estimate, Setting, estimate, estimate_family
from helixpipe.runtime.emulated import rehearse
from helixpipe.runtime.forked import run_forked
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.looped import looped
from helixpipe.schedule.families.v_shape import v_stages
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.torch_text import read_cell

RANKS, MICROBATCHES, LENGTH = 8, 16, 131072
MANY = 64

# name -> (family, options)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "1f1b": ("1f1b", {}),
    "interleaved, v=2": ("interleaved", {"stages_per_rank": 2}),
    "zb_v": ("zb_v", {}),
    "seq1f1b, k=8": ("seq1f1b", {"segments": 8}),
    "seq1f1b_interleaved, k=8, v=2": ("seq1f1b_interleaved", {"segments": 8, "stages_per_rank": 2}),
    "helix, two-fold, nothing travels": ("helix", {"travel": "none"}),
    "helix, two-fold, qkv travels": ("helix", {"travel": "qkv"}),
    "helix, two-fold, attention travels": ("helix", {"travel": "attention"}),
    "1f1b, vocabulary spread": ("1f1b", {"vocabulary": "spread"}),
    "zb_v, vocabulary spread": ("zb_v", {"vocabulary": "spread"}),
    "seq1f1b, k=8, vocabulary spread": ("seq1f1b", {"segments": 8, "vocabulary": "spread"}),
    "seq1f1b_interleaved, k=8, v=2, vocabulary spread": (
        "seq1f1b_interleaved", {"segments": 8, "stages_per_rank": 2, "vocabulary": "spread"},
    ),
}  # fmt: skip
# the best of ours by simulation, and some with fewer actions, all within a fifth of torch's activations; longer steps
BEST: dict[str, tuple[str, dict[str, Any]]] = {
    "seq1f1b_interleaved, k=12, v=2": ("seq1f1b_interleaved", {"segments": 12, "stages_per_rank": 2}),
    "seq1f1b_interleaved, k=12, v=4": ("seq1f1b_interleaved", {"segments": 12, "stages_per_rank": 4}),
    "seq1f1b_interleaved, k=16, v=4": ("seq1f1b_interleaved", {"segments": 16, "stages_per_rank": 4}),
}
TORCHS_BEST = "torch InterleavedZeroBubble, v=4"
# name -> (torch's class, stages a rank)
TORCH: dict[str, tuple[str, int]] = {
    "torch 1F1B": ("1F1B", 1),
    "torch Interleaved1F1B, v=2": ("Interleaved1F1B", 2),
    "torch Interleaved1F1B, v=4": ("Interleaved1F1B", 4),
    "torch InterleavedZeroBubble, v=2": ("InterleavedZeroBubble", 2),
    "torch InterleavedZeroBubble, v=4": ("InterleavedZeroBubble", 4),
    "torch ZBVZeroBubble": ("ZBVZeroBubble", 2),
}


@dataclass
class Measured:
    """One run: seconds of the step, whether the order was the program's (None: not seen), load before it."""

    seconds: float
    order_equal: bool | None
    load: float
    simulated_s: float
    peak_activation_bytes: int


Runs = dict[str, list[Measured]]


def ours(found: Estimate, scale: float) -> Measured:
    load = os.getloadavg()[0]
    timeline = rehearse(found.program, lambda action: scale * found.seconds(action), timeout_s=120)
    return Measured(
        timeline.makespan_s,
        timeline.order == found.schedule.ranks,
        load,
        scale * found.timeline.makespan_s,
        _peak(found),
    )


def torchs(setting: Setting, name: str, scale: float) -> Measured:
    """The same stages, cut with the same balance, under torch's schedule and runtime."""
    kind, per_rank = TORCH[name]
    ends = setting.balance["ends"]
    layers = setting.shape.layers
    stages = v_stages(RANKS, layers, (), ends) if kind[0] == "Z" else looped(RANKS, layers, per_rank, (), ends)
    plain = setting.build("interleaved", RANKS, MICROBATCHES, stages_per_rank=per_rank)
    assert plain.stages == stages  # a V has the same stages, on other ranks
    seconds = estimate(plain, setting).seconds
    each = [tuple(scale * seconds(Action(s, p, 0)) for p in (Pass.F, Pass.I, Pass.W)) for s in range(len(stages))]
    load = os.getloadavg()[0]
    ranks = run_forked(TorchStep(kind, RANKS, MICROBATCHES, each))  # type: ignore[arg-type]
    # every stage slept every part of every micro-batch once; how late sleeps end is part of what is measured
    assert [sum(rank["sleeps"][kind] for rank in ranks) for kind in range(3)] == [MICROBATCHES * len(stages)] * 3
    rows = ranks[0]["order"] or [[str(action) for action in order] for order in plain.ranks]
    schedule = Schedule(stages, tuple(tuple(a for cell in row for a in read_cell(cell, name)) for row in rows))
    same = estimate(schedule, setting)
    makespan_s = max(rank["end_s"] for rank in ranks) - min(rank["start_s"] for rank in ranks)
    return Measured(makespan_s, None, load, scale * same.timeline.makespan_s, _peak(same))


def _peak(found: Estimate) -> int:
    return max(found.timeline.peak_activation_bytes)


def many(setting: Setting, name: str, options: dict[str, Any], seconds: float) -> Measured:
    found = estimate_family(setting, name, MANY, MANY, **options)
    return ours(found, seconds / found.timeline.makespan_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of all contenders; 0 leaves them out")
    parser.add_argument("--seconds", type=float, default=25.0, help="of the simulated 1F1B step in these")
    parser.add_argument("--best-rounds", type=int, default=3, help="of the best ones; 0 leaves them out")
    parser.add_argument("--best-seconds", type=float, default=60.0, help="of the simulated 1F1B step in these")
    parser.add_argument("--only", default="", help="words, semicolon separated: contenders whose name has one")
    parser.add_argument("--no-many", action="store_true", help="leave the 64 ranks out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    setting = Setting(named_shape("7b"), LENGTH, keeping=Keeping("none", 2, device="cuda"))
    base_s = estimate_family(setting, "1f1b", RANKS, MICROBATCHES).timeline.makespan_s
    words = [word for word in args.only.split(";") if word]

    def rounds(count: int, step_s: float, mine: dict[str, tuple[str, dict[str, Any]]], theirs: list[str]) -> Runs:
        """Contenders one after another, the order turned from round to round; times scaled by 1F1B's."""
        scale, found = step_s / base_s, {}
        names = [name for name in (*mine, *theirs) if not words or any(word in name for word in words)]
        for name in names:
            if name in mine:
                family, options = mine[name]
                priced = estimate_family(setting, family, RANKS, MICROBATCHES, **options)
                found[name] = lambda priced=priced: ours(priced, scale)
            else:
                found[name] = lambda name=name: torchs(setting, name, scale)
        runs: Runs = {name: [] for name in names}
        for turn in range(count):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                run = found[name]()
                runs[name].append(run)
                _say(
                    f"round {turn + 1}, {name}: {run.seconds:.3f} s, simulated {run.simulated_s:.3f} s, load {run.load:.1f}"
                )
        return runs

    result: dict[str, Any] = {"machine": machine()}
    ideal = setting.microbatch_s * MICROBATCHES / RANKS / base_s
    if args.rounds:
        runs = rounds(args.rounds, args.seconds, OURS, list(TORCH))
        result["all"] = {"rounds": args.rounds, "ideal_s": ideal * args.seconds, "rows": rows(runs)}
    if args.best_rounds:
        runs = rounds(args.best_rounds, args.best_seconds, BEST, [TORCHS_BEST])
        result["best"] = {"rounds": args.best_rounds, "ideal_s": ideal * args.best_seconds, "rows": rows(runs)}
        result["duels"] = [duel(name, runs) for name in BEST if name in runs and TORCHS_BEST in runs]
    if not args.no_many:
        deep = Setting(named_shape("7b", layers=2 * MANY), LENGTH, keeping=Keeping("none", 2, device="cuda"))
        runs = {}
        for name, options in (("1f1b", {}), ("seq1f1b", {"segments": 2})):
            begun = time.perf_counter()
            runs[f"{name}, {MANY} ranks"] = [run := many(deep, name, options, 20.0)]
            _say(f"{MANY} ranks, {name}: {run.seconds:.3f} s, {time.perf_counter() - begun:.1f} s with start and end")
        result["many"] = {"rounds": 1, "ideal_s": None, "rows": rows(runs)}
    print(json.dumps(result, indent=2) if args.json else text(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def rows(runs: Runs) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "seconds": [run.seconds for run in each],
            "simulated_s": each[0].simulated_s,
            "over_simulated": [run.seconds / run.simulated_s for run in each],
            "order_equal": None if each[0].order_equal is None else all(run.order_equal for run in each),
            "peak_activation_bytes": each[0].peak_activation_bytes,
            "load": [run.load for run in each],
        }
        for name, each in runs.items()
    }


def duel(name: str, runs: Runs) -> dict[str, Any]:
    """Ours against torch's best, round by round."""
    pairs = list(zip(runs[name], runs[TORCHS_BEST], strict=True))
    ratios = [other.seconds / mine.seconds for mine, other in pairs]
    share = pairs[0][0].peak_activation_bytes / pairs[0][1].peak_activation_bytes
    return {"ours": name, "torch": TORCHS_BEST, "torch_over_ours": ratios, "activations_of_torch": share}


def text(result: dict[str, Any]) -> str:
    lines = [result["machine"]]
    for part in ("all", "best", "many"):
        if part in result:
            lines += ["", *table(result[part])]
    for each in result.get("duels", ()):
        lines += [
            "",
            f"{each['torch']} takes {_spread(each['torch_over_ours'])} times as long as {each['ours']}, "
            f"which keeps {each['activations_of_torch']:.3f} of its activations.",
        ]
    return "\n".join(lines)


def table(part: dict[str, Any]) -> list[str]:
    loads = [load for row in part["rows"].values() for load in row["load"]]
    lines = [
        f"{part['rounds']} rounds; load before a rehearsal {min(loads):.1f} to {max(loads):.1f}:",
        "",
        "| schedule | rehearsed, s | over simulated | order | over ideal | peak activations, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in part["rows"].items():
        middle, peak = statistics.median(row["seconds"]), row["peak_activation_bytes"] / 2**30
        order = {None: "torch's", True: "equal", False: "NOT EQUAL"}[row["order_equal"]]
        over = f"{middle / part['ideal_s']:.3f}" if part["ideal_s"] else ""
        lines.append(f"| {name} | {middle:.2f} | {_spread(row['over_simulated'])} | {order} | {over} | {peak:.1f} |")
    return lines


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"


if __name__ == "__main__":
    main()
