"""Rehearsals against simulations, and against torch.distributed.pipelining. `python benchmarks/rehearsal/run.py`

8 ranks, 16 micro-batches of 131,072 tokens, the 7B shape, every FLOP at one rate, messages free, nothing recomputed;
all times scaled so that a simulated 1F1B step lasts --seconds. Ours: the real executor, transport and processes, with
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from incumbent import TorchStep
from peers import machine

from helixpipe.predict.estimate import Estimate, Setting, estimate, estimate_family
from helixpipe.predict.memory import Keeping
from helixpipe.runtime.emulated import rehearse
from helixpipe.runtime.forked import run_forked
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.looped import looped
from helixpipe.schedule.families.v_shape import v_stages
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.torch_text import read_cell
from helixpipe.shape import named_shape

RANKS, MICROBATCHES, LENGTH = 8, 16, 131072
MANY = 64

# name -> (family, options)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "1f1b": ("1f1b", {}),
    "interleaved, v=2": ("interleaved", {"stages_per_rank": 2}),
    "zb_v": ("zb_v", {}),
    "seq1f1b, k=8": ("seq1f1b", {"segments": 8}),
    "seq1f1b_interleaved, k=8, v=2": ("seq1f1b_interleaved", {"segments": 8, "stages_per_rank": 2}),
    "seq1f1b_interleaved, k=16, v=4": ("seq1f1b_interleaved", {"segments": 16, "stages_per_rank": 4}),
    "helix, two-fold, nothing travels": ("helix", {"travel": "none"}),
    "helix, two-fold, qkv travels": ("helix", {"travel": "qkv"}),
    "helix, two-fold, attention travels": ("helix", {"travel": "attention"}),
}
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
    slept, modelled = sum(sum(rank["slept_s"]) for rank in ranks), MICROBATCHES * sum(map(sum, each))
    assert modelled <= slept < 1.02 * modelled, f"{name}: slept {slept} s, the model has {modelled} s"
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
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25.0, help="of the simulated 1F1B step")
    parser.add_argument("--only", default="", help="words, semicolon separated: contenders whose name has one")
    parser.add_argument("--no-many", action="store_true", help="leave the 64 ranks out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    setting = Setting(named_shape("7b"), LENGTH, keeping=Keeping("none", 2))
    ideal_s = setting.microbatch_s * MICROBATCHES / RANKS
    scale = args.seconds / estimate_family(setting, "1f1b", RANKS, MICROBATCHES).timeline.makespan_s
    contenders: dict[str, Callable[[], Measured]] = {}
    for name, (family, options) in OURS.items():
        found = estimate_family(setting, family, RANKS, MICROBATCHES, **options)
        contenders[name] = lambda found=found: ours(found, scale)  # type: ignore[misc]
    for name in TORCH:
        contenders[name] = lambda name=name: torchs(setting, name, scale)  # type: ignore[misc]
    words = [word for word in args.only.split(";") if word]
    contenders = {n: c for n, c in contenders.items() if not words or any(word in n for word in words)}

    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run = contenders[name]()
            runs[name].append(run)
            _say(
                f"round {turn + 1}, {name}: {run.seconds:.3f} s, simulated {run.simulated_s:.3f} s, load {run.load:.1f}"
            )
    if not args.no_many:
        deep = Setting(named_shape("7b", layers=2 * MANY), LENGTH, keeping=Keeping("none", 2))
        for name, options in (("1f1b", {}), ("seq1f1b", {"segments": 8})):
            begun = time.perf_counter()
            run = many(deep, name, options, 20.0)
            runs[f"{MANY} ranks: {name}"] = [run]
            _say(f"{MANY} ranks, {name}: {run.seconds:.3f} s, {time.perf_counter() - begun:.1f} s with start and end")
    result = summary(args, ideal_s * scale, runs)
    print(json.dumps(result, indent=2) if args.json else table(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def summary(args: argparse.Namespace, ideal_s: float, runs: dict[str, list[Measured]]) -> dict[str, Any]:
    rows = {
        name: {
            "seconds": [run.seconds for run in each],
            "simulated_s": each[0].simulated_s,
            "over_simulated": [run.seconds / run.simulated_s for run in each],
            "order_equal": None if each[0].order_equal is None else all(run.order_equal for run in each),
            "peak_activation_bytes": each[0].peak_activation_bytes,
        }
        for name, each in runs.items()
    }
    loads = [run.load for each in runs.values() for run in each]
    given = {"rounds": args.rounds, "load": [min(loads), max(loads)], "ideal_s": ideal_s}
    result: dict[str, Any] = {"machine": machine(), **given, "rows": rows}
    best = {
        side: min(
            (n for n in side_names if n in rows), key=lambda n: statistics.median(rows[n]["seconds"]), default=None
        )
        for side, side_names in (("ours", OURS), ("torch", TORCH))
    }
    if best["ours"] and best["torch"]:
        mine, other = rows[best["ours"]], rows[best["torch"]]
        faster = [b / a for a, b in zip(mine["seconds"], other["seconds"], strict=True)]
        result["best"] = best | {
            "torch_over_ours": [statistics.median(faster), min(faster), max(faster)],
            "activations_of_torch": mine["peak_activation_bytes"] / other["peak_activation_bytes"],
        }
    return result


def table(result: dict[str, Any]) -> str:
    low, high = result["load"]
    lines = [
        f"{result['machine']}; {result['rounds']} rounds; load before a rehearsal {low:.1f} to {high:.1f}",
        "",
        "| schedule | rehearsed, s | over simulated | order | over ideal | peak activations, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        middle, ratios = statistics.median(row["seconds"]), row["over_simulated"]
        spread = f"{statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"
        order = {None: "torch's", True: "equal", False: "NOT EQUAL"}[row["order_equal"]]
        over = "" if name.startswith(str(MANY)) else f"{middle / result['ideal_s']:.3f}"
        peak = row["peak_activation_bytes"] / 2**30
        lines.append(f"| {name} | {middle:.2f} | {spread} | {order} | {over} | {peak:.1f} |")
    if "best" in result:
        best = result["best"]
        middle, least, most = best["torch_over_ours"]
        lines += [
            "",
            f"torch's best ({best['torch']}) takes {middle:.3f} ({least:.3f} to {most:.3f}) of the time of our best "
            f"({best['ours']}), which keeps {best['activations_of_torch']:.3f} of its activations.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
