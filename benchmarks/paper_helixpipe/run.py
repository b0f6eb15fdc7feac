"""HelixPipe predicted beside what its paper measured. `python benchmarks/paper_helixpipe/run.py`

1.3B to 13B, 32k to 128k tokens, p = 2, 4, 8 nodes of eight H20 each, m = 2p. Every number but those under PUBLISHED is
predicted: the schedule is built, lowered and simulated, messages and all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Estimate, Setting, estimate_family
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.simulate import simulate_program
from helixpipe.schedule.program import Run

PUBLISHED = {
    "source": "arXiv 2507.00394, abstract",
    "speedup over the best of 1F1B, ZB1P and AdaPipe": 1.26,
    "at": {"model": "7b", "tokens": 131072, "accelerators": 64, "ranks": 8},
}
HEADLINE = ("7b", 131072, 8)
MODELS = ("1.3b", "3b", "7b", "13b")
LENGTHS = (32768, 65536, 131072)
RANKS = (2, 4, 8)
TENSOR_PARALLEL = 8
CHUNK = 4096


@dataclass(frozen=True)
class Way:
    """One way to run a contender."""

    family: str
    recompute: str
    mlp_chunk: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    head_chunk: int = 0

    def __str__(self) -> str:
        told = [f"{name} {value}" for name, value in self.options.items() if name == "travel"]
        told += [f"recompute {self.recompute}"] + ["chunked MLP"] * (self.mlp_chunk > 0)
        told += ["chunked head"] * (self.head_chunk > 0)
        return f"{self.family}, {', '.join(told)}"


EQUAL = {"ends": (0, 0)}  # as many layers on every rank, as Megatron has it, whatever embedding and head cost
TRAVEL = ("none", "qkv", "attention")
OTHERS: dict[str, tuple[Way, ...]] = {
    "1F1B": (Way("1f1b", "none", 0, EQUAL),),
    "ZB1P": (Way("zb_h1", "none", 0, EQUAL),),
    "AdaPipe-like": tuple(Way("1f1b", recompute) for recompute in ("none", "selective", "full")),
}
HELIX: dict[str, tuple[Way, ...]] = {
    f"helix, {travel} travels": (Way("helix", "selective", CHUNK, {"folds": 2, "travel": travel}),) for travel in TRAVEL
}
WHOLE: dict[str, tuple[Way, ...]] = {
    f"helix, {travel} travels, MLP whole": (Way("helix", "selective", 0, {"folds": 2, "travel": travel}),)
    for travel in TRAVEL
}
# What the authors' repository runs (github.com/code-tunnel/Megatron-LM): its launch script passes --transfer-weight,
# and its chunked MLP keeps what its slices make, so that no forward runs a third time. Chunked here, it does run again,
# but where the attention block travels: there the MLP ends its stage, and a recompute leaves it out.
PAPERS = "helix, qkv travels, MLP whole"


@dataclass(frozen=True)
class Assumptions:
    """What the prediction stands on; one is varied at a time."""

    name: str = "as stated"
    accelerator: dict[str, Any] = field(default_factory=dict)
    """Fields of the H20 that differ."""
    link: str = "infiniband"
    tensor_link: str = "nvlink"
    blocking: bool = False
    """Whether a rank computes nothing while what it waits for travels."""
    memory_share: float = 1.0
    """Of the 96 GB, what a run can fill."""

    def setting(self, model: str, length: int) -> Setting:
        return Setting(
            named_shape(model), length, replace(named_accelerator("h20"), **self.accelerator), named_link(self.link),
            Keeping("selective", 2, device="cuda", keeps_activated=True),
            1, TENSOR_PARALLEL, named_link(self.tensor_link),
            megatron=True,
        )  # fmt: skip


def attention(forward: float, backward: float) -> dict[str, float]:
    return {"attention_efficiency": forward, "attention_backward_efficiency": backward}


VARIED = (
    Assumptions(),
    Assumptions("messages take no time", link="free"),
    Assumptions("100 Gbit/s a rank between nodes", link="ethernet"),
    Assumptions("messages are waited for, not overlapped", blocking=True),
    Assumptions("messages inside a node take no time", tensor_link="free"),
    Assumptions("attention reaches 0.50 of the peak, 0.40 backward", attention(0.5, 0.4)),
    Assumptions("attention reaches 0.85, as matrix products do", attention(0.85, 0.85)),
    Assumptions("matrix products reach 0.70", {"matmul_efficiency": 0.7}),
    Assumptions("starting a part takes no time", {"launch_s": 0.0}),
    Assumptions("starting a part takes 200 us", {"launch_s": 200e-6}),
    Assumptions("a tenth of the memory cannot be filled", memory_share=0.9),
    Assumptions("three tenths of the memory cannot be filled", memory_share=0.7),
)  # fmt: skip


def priced(way: Way, model: str, length: int, ranks: int, given: Assumptions) -> dict[str, Any]:
    setting = given.setting(model, length)
    chunks = {"mlp_chunk": way.mlp_chunk, "head_chunk": way.head_chunk}
    keeping = replace(setting.keeping, recompute=way.recompute, **chunks)
    setting = replace(setting, keeping=keeping)
    ideal_s = setting.microbatch_s * 2
    found = estimate_family(setting, way.family, ranks, 2 * ranks, **way.options)
    step_s = blocking_s(found) if given.blocking else found.timeline.makespan_s
    peaks = found.timeline.peak_bytes
    return {
        "way": str(way), "step_s": step_s, "over_ideal": step_s / ideal_s, "peak_bytes": max(peaks),
        "fits": max(peaks) <= setting.accelerator.memory_bytes * given.memory_share, "least_bytes": min(peaks),
        "next_bytes": sorted(peaks)[-2],
        "tokens_per_s": 2 * ranks * length / step_s,
    }  # fmt: skip


def blocking_s(found: Estimate) -> float:
    """The step where every action starts with the time its messages take."""
    waited = {
        step.action: sum(map(found.message_seconds, step.waits))
        for rank in found.program.ranks
        for step in rank
        if isinstance(step, Run)
    }
    return simulate_program(found.program, lambda action: found.seconds(action) + waited[action]).makespan_s


def cell(model: str, length: int, ranks: int, given: Assumptions | None = None) -> dict[str, Any]:
    """Every contender: the fastest of its ways that fits, or the leanest when none does."""
    contenders = {}
    for name, ways in (OTHERS | HELIX | WHOLE).items():
        tried = [priced(way, model, length, ranks, given or VARIED[0]) for way in ways]
        fitting = [each for each in tried if each["fits"]]
        leanest = min(tried, key=lambda each: each["peak_bytes"])
        contenders[name] = min(fitting, key=lambda each: each["step_s"], default=leanest)
    found: dict[str, Any] = {"model": model, "tokens": length, "ranks": ranks, "contenders": contenders}
    for key, names in (("best_other", OTHERS), ("best_helix", HELIX), ("best_whole", WHOLE)):
        fits = [name for name in names if contenders[name]["fits"]]
        found[key] = min(fits, key=lambda name: contenders[name]["step_s"], default=None)
    for key, name in (("papers_ratio", PAPERS), ("ratio", found["best_helix"]), ("whole_ratio", found["best_whole"])):
        found[key] = over(contenders, found["best_other"], name)
    found["1f1b_ratio"] = over(contenders, "1F1B", found["best_helix"], must_fit=False)
    return found


def over(contenders: dict[str, Any], other: str | None, name: str | None, must_fit: bool = True) -> float | None:
    """How many times as fast `name` is as `other`."""
    if other is None or name is None or (must_fit and not contenders[name]["fits"]):
        return None
    return float(contenders[other]["step_s"] / contenders[name]["step_s"])


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def gigabytes(contender: dict[str, Any]) -> str:
    return f"{contender['peak_bytes'] / 1e9:.0f}" + ("" if contender["fits"] else " (no)")


def tables(result: dict[str, Any]) -> str:
    lines = [
        "Ratios: how many times as fast HelixPipe is as the fastest of the others that fits 96 GB.", "",
        "| model | p | tokens | fastest other | its step over no bubble | the authors' | "
        "MLP whole, best | MLP chunked, best | GB: 1F1B | ZB1P | helix none | qkv | attention |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for each in result["cells"]:
        by = each["contenders"]
        other = each["best_other"]
        ways = f"{other} ({by[other]['way'].split(', ', 1)[1]})" if other else "none fits"
        memory = [gigabytes(by[name]) for name in ("1F1B", "ZB1P", *HELIX)]
        ratios = [times(each[key]) for key in ("papers_ratio", "whole_ratio", "ratio")]
        over_ideal = f"{by[other]['over_ideal']:.3f}" if other else "-"
        row = [each["model"], each["ranks"], f"{each['tokens'] // 1024}k", ways, over_ideal, *ratios, *memory]
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "| at the headline | step over no bubble | GB on the fullest rank |", "| --- | --- | --- |"]
    lines += [f"| {each['way']} | {each['over_ideal']:.3f} | {gigabytes(each)} |" for each in result["composition"]]
    model, length, ranks = HEADLINE
    lines += [
        "", f"{model}, {length // 1024}k tokens, p = {ranks}. Published ({PUBLISHED['source']}): 1.26.", "",
        "| assumption | fastest other | the authors' | over 1F1B | its MLP chunked | over 1F1B | attention travels, chunked |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in result["varied"]:
        told = " | ".join(
            times(row[key]) for key in ("papers", "over_1f1b", "chunked", "chunked_over_1f1b", "attention_chunked")
        )
        lines.append(f"| {row['assumption']} | {row['fastest_other']} | {told} |")
    return "\n".join(lines)


def vary(assumptions: Sequence[Assumptions] = VARIED, at: tuple[str, int, int] = HEADLINE) -> list[dict[str, Any]]:
    rows = []
    for given in assumptions:
        found = cell(*at, given)
        by, other = found["contenders"], found["best_other"]
        chunked = PAPERS.removesuffix(", MLP whole")
        rows.append({
            "assumption": given.name,
            "fastest_other": f"{other} ({by[other]['way'].split(', ', 1)[1]})" if other else "none fits",
            "papers": over(by, other, PAPERS), "over_1f1b": over(by, "1F1B", PAPERS),
            "chunked": over(by, other, chunked), "chunked_over_1f1b": over(by, "1F1B", chunked),
            "attention_chunked": over(by, other, "helix, attention travels"),
        })  # fmt: skip
    return rows


def composition(at: tuple[str, int, int] = HEADLINE) -> list[dict[str, Any]]:
    """What recompute and chunks cost, and what each way needs."""
    steps = (("none", 0, 0), ("selective", 0, 0), ("selective", CHUNK, 0), ("selective", CHUNK, CHUNK))
    others = (*OTHERS["1F1B"], *OTHERS["ZB1P"], Way("zb_h1", "none", 0, EQUAL, CHUNK), Way("1f1b", "selective"))
    ways = (
        Way("helix", recompute, mlp, {"folds": 2, "travel": travel}, head)
        for travel in ("qkv", "attention")
        for recompute, mlp, head in steps
    )
    return [priced(way, *at, VARIED[0]) for way in (*others, *ways)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    cells = [cell(m, length, p) for m in args.models for p in args.ranks for length in args.lengths]
    result = {"published": PUBLISHED, "cells": cells, "composition": composition(), "varied": vary()}
    print(json.dumps(result, indent=2) if args.json else tables(result))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
