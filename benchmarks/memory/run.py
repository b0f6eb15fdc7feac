"""Is what a timeline counts what the allocator holds? `python benchmarks/memory/run.py`

Each case is a step on fresh local ranks over gloo, one thread each. Compared on each rank: the most bytes on the heap
beyond what stood before the step (all threads, see `benchmarks/heap.py`), the most that the measured timeline counts at
one time, and the most that the predicted one does. torch's schedules run the same model and are measured alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from heap import NoMeter
from memory.anatomy import anatomies, told
from memory.measure import LIMIT_S, Case, Peak, peaks
from peers import machine
from torch_pipelines import TORCH

from helixpipe.errors import HelixpipeError
from helixpipe.schedule.families import FAMILIES, options

CHUNK = 512
OPTIONS = {"segments": 4, "stages_per_rank": 2}
"""With these a family runs that has them."""
TRAVELS = ("none", "qkv", "attention")
POLICIES = ("none", "full", "selective")
SIZED: tuple[Case, ...] = (
    Case("1f1b"),
    Case("1f1b", "selective", CHUNK),
    Case("zb_v"),
    Case("seq1f1b_interleaved", "selective", CHUNK, OPTIONS),
    Case("helix", "selective", CHUNK, {"travel": "attention"}),
)
FEW: tuple[Case, ...] = (*SIZED, Case("1f1b", "full", CHUNK), Case("helix", "selective", CHUNK, {"travel": "none"}))
MIB = 2**20
RATIOS = ("heap_over_timeline", "predicted_over_heap")


def families() -> Iterator[Case]:
    """Every family, with every policy, whole and chunked."""
    for family in FAMILIES:
        given = {name: value for name, value in OPTIONS.items() if name in options(family)}
        for travel in TRAVELS if family == "helix" else (None,):
            more = {} if travel is None else {"travel": travel}
            for recompute in POLICIES:
                yield from (Case(family, recompute, chunk, given | more) for chunk in (0, CHUNK))


def depths() -> Iterator[Case]:
    """One stage, deeper and deeper: what does not grow with its layers, and what must."""
    for layers in (4, 8, 16):
        yield Case("1f1b", "full", CHUNK, ranks=1, layers=layers)
        yield Case("1f1b", chunk=CHUNK, ranks=1, layers=layers, evaluates=True)
    yield Case("1f1b", "full", CHUNK, ranks=1, length=1024)


def sizes() -> Iterator[Case]:
    """Some of the few at other widths and lengths, of fewer layers and micro-batches, which take less time."""
    for case in SIZED:
        for hidden in (128, 256, 512):
            for length in (1024, 2048, 4096):
                yield replace(case, layers=4, microbatches=2, hidden=hidden, length=length)


def torchs() -> Iterator[Case]:
    yield from map(Case, TORCH)


def cases(args: argparse.Namespace) -> list[Case]:
    """Those asked for, each once."""
    found = [*FEW, *depths(), *torchs()] if args.quick else [*families(), *depths(), *torchs(), *sizes()]
    words = [word.strip() for word in args.only.split(",") if word.strip()]
    return [case for case in found if all(word in str(case) for word in words)]


def measured(case: Case) -> dict[str, Any]:
    """A row: the case's name and each rank's bytes, or what went wrong."""
    began = time.perf_counter()
    row: dict[str, Any] = {"case": str(case), "group": group(case)}
    try:
        (found,) = peaks([case])
        row["ranks"] = [as_row(peak) for peak in found]
    except HelixpipeError as error:
        row["error"] = str(error)
    took = time.perf_counter() - began
    print(f"{case}: {brief(row)} ({took:.0f} s)", file=sys.stderr, flush=True)
    return row


def written(case: Case, record: Path | None) -> dict[str, Any]:
    """A row, and a line of the record of it where there is one."""
    row = measured(case)
    if record is not None and "error" not in row:
        with record.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def as_row(peak: Peak) -> dict[str, Any]:
    ratios = {"heap_over_timeline": peak.heap_over_timeline, "predicted_over_heap": peak.predicted_over_heap}
    return vars(peak) | ratios


def group(case: Case) -> str:
    """Cases that are summed up in one line."""
    if case.is_torch or case.evaluates:
        return "torch" if case.is_torch else "evaluation"
    if case.ranks == 1:
        return "one rank"
    sized = (case.layers, case.hidden, case.length) != (Case.layers, Case.hidden, Case.length)
    return "other sizes" if sized else f"recompute {case.recompute}" + ", chunked" * (case.chunk > 0)


def brief(row: dict[str, Any]) -> str:
    return " | ".join(cells(row))


def cells(row: dict[str, Any]) -> list[str]:
    """Of a case: bytes in MiB and ratios, of all ranks; a dash for what nobody counts."""
    if "error" in row:
        return [row["error"], *"----"]
    ranks = row["ranks"]
    megabytes = ([rank[f"{name}_bytes"] for rank in ranks] for name in ("heap", "timeline", "predicted"))
    heap, *others = ([None if each is None else f"{each / MIB:.1f}" for each in of_all] for of_all in megabytes)
    ratios = ([None if rank[name] is None else f"{rank[name]:.3f}" for rank in ranks] for name in RATIOS)
    standing = [f" ({rank['standing_bytes'] / MIB:.0f})" if rank["standing_bytes"] else "" for rank in ranks]
    heap = [f"{each}{more}" for each, more in zip(heap, standing, strict=True)]
    return ["-" if None in each else ", ".join(map(str, each)) for each in (heap, *others, *ratios)]


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}. MiB, rank by rank; in brackets, what torch's receive buffers hold of it from step to step.",
        "",
        "| case | heap | timeline | predicted | heap over timeline | predicted over heap |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {row['case']} | {brief(row)} |" for row in result["rows"]),
        "",
    ]
    for name in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["group"] == name]
        lines += [f"{name}: {spread(rows, ratio)}" for ratio in RATIOS if spread(rows, ratio)]
    return "\n".join(lines)


def spread(rows: list[dict[str, Any]], name: str) -> str:
    """Of a ratio, over all ranks of all rows; empty where there is none."""
    ratios = [rank[name] for row in rows for rank in row.get("ranks", ()) if rank[name] is not None]
    if not ratios:
        return ""
    within = sum(0.9 <= ratio <= 1.1 for ratio in ratios)
    return (
        f"{name.replace('_', ' ')} {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}, "
        f"{within} of {len(ratios)} from 0.90 to 1.10"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few families, the depths and torch's")
    parser.add_argument(
        "--only", default="", help="comma separated: words that are all in the names of the cases to run"
    )
    parser.add_argument(
        "--anatomy", action="store_true", help="instead: every tensor alive at each rank's peak, of ours"
    )
    parser.add_argument("--record", type=Path, help="a line of JSON a case: what is in it already is not run again")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = cases(args)
    lines = args.record.read_text().splitlines() if args.record and args.record.exists() else []
    known = {row["case"]: row for row in map(json.loads, lines)}
    if not found:
        parser.error(f"--only {args.only}: no case has all these words in its name")
    try:
        if args.anatomy:
            for case in (case for case in found if not case.is_torch):
                print("\n".join(told(case, anatomies(case, LIMIT_S))), flush=True)
            return 0
        rows = [known.get(str(case)) or written(case, args.record) for case in found]
    except (NoMeter, HelixpipeError) as error:
        print(error, file=sys.stderr)
        return 2
    result = {"machine": machine(), "rows": rows}
    print(json.dumps(result, indent=2) if args.json else table(result))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
