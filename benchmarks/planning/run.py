"""How fast is planning, and does its cost grow with the number of actions? `python benchmarks/planning/run.py`

First a plan of p=8, m=16, L=32 (7B, 128k tokens): candidates and seconds. Then single schedules of p=64 and L=128 at three
sizes, generated, checked, lowered and simulated: processor seconds of each step and microseconds an action.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import itertools

from peers import machine

from helixpipe.parts.shapes import named_shape
from helixpipe.predict.estimate import Setting, priced
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.plan import plan
from helixpipe.schedule.lower import lower

SEQUENCE_LENGTH = 131072
SIZES = (64, 128, 256)  # dualpipe_v needs two micro-batches a rank
SCHEDULES: dict[str, dict[str, int]] = {
    "1f1b": {}, "zb_h1": {}, "interleaved": {"stages_per_rank": 2}, "dualpipe_v": {}, "helix": {},
    "seq1f1b": {"segments": 4}, "zb_v": {}, "v_half": {},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="families, comma separated")
    parser.add_argument("--skip-plan", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = [name for name in SCHEDULES if not args.only or name in args.only.split(",")]
    result: dict[str, Any] = {"machine": machine(), "processes": args.processes}
    if not args.skip_plan:
        result["plan"] = search(args.processes)
    result["schedules"] = [single(name, m) for name in names for m in SIZES if name != "dualpipe_v" or m >= 128]
    print(json.dumps(result, indent=2) if args.json else table(result))


def search(processes: int) -> dict[str, float]:
    setting = Setting(named_shape("7b"), SEQUENCE_LENGTH, named_accelerator("h20"), named_link("infiniband"))
    begun = time.perf_counter()
    found = plan(setting, 8, 16, math.inf, processes=processes)
    return {"candidates": len(found.fits) + len(found.refused), "seconds": time.perf_counter() - begun}


def single(family: str, microbatches: int) -> dict[str, Any]:
    shape = replace(named_shape("7b"), layers=128)
    setting = Setting(shape, SEQUENCE_LENGTH)
    at = [time.process_time()]
    schedule = setting.build(family, 64, microbatches, **SCHEDULES[family])
    at.append(time.process_time())
    program = lower(schedule, shape, setting.batch(schedule.segments))
    at.append(time.process_time())
    priced(program, setting)
    at.append(time.process_time())
    actions = sum(map(len, schedule.ranks))
    steps = dict(zip(("build_s", "lower_s", "simulate_s"), (b - a for a, b in itertools.pairwise(at)), strict=True))
    return {"family": family, "microbatches": microbatches, "actions": actions, **steps, "total_s": at[-1] - at[0]}


def table(result: dict[str, Any]) -> str:
    lines = [result["machine"], ""]
    if "plan" in result:
        found = result["plan"]
        lines += [f"{found['candidates']} candidates in {found['seconds']:.1f} s, {result['processes']} processes", ""]
    lines += [
        "| family | m | actions | build and check, s | lower, s | simulate, s | together, s | us an action |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["schedules"]:
        each = 1e6 * row["total_s"] / row["actions"]
        lines.append(
            f"| {row['family']} | {row['microbatches']} | {row['actions']:,} | {row['build_s']:.1f} | {row['lower_s']:.1f} "
            f"| {row['simulate_s']:.1f} | {row['total_s']:.1f} | {each:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
