"""Seq1F1B predicted beside what its authors measured. `python benchmarks/paper_seq1f1b/run.py`

Their 7B model on 32 A100: tokens per second, memory, and what does not fit. Every number but those under PUBLISHED is
predicted: the schedule is built, lowered and simulated, messages and all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Estimate, Setting, estimate_family
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.simulate import simulate_program
from helixpipe.schedule.program import Run

METHODS = ("1F1B", "1F1B-I", "Seq1F1B", "Seq1F1B-I")
OUT = None  # out of memory
LENGTHS = (32768, 65536, 131072)
MICROBATCHES = (8, 16)

PUBLISHED_SOURCE = (
    "arXiv 2406.03488, the table for 7B on 32 GPUs; "
    "m = 16 as in github.com/thunlp/Seq1F1B, picture/32x7b zhihu_throughput.tex"
)
PUBLISHED_TOKENS_PER_S: dict[tuple[int, int], tuple[float | None, ...]] = {
    (32768, 8): (48189, 52964, 53485, 47232),
    (32768, 16): (55333, 56304, 55765, 46195),
    (65536, 8): (37343, 41677, 43297, 40908),
    (65536, 16): (43063, 44712, 33367, 40990),
    (131072, 8): (OUT, OUT, 30392, 30023),
    (131072, 16): (OUT, OUT, 31584, 30362),
}
PUBLISHED_MEMORY_SOURCE = (
    "github.com/thunlp/Seq1F1B, picture/7bx32A100_memory.svg, right panel (it has no title): "
    "heights of its bars over its axis"
)
PUBLISHED_GB: dict[int, tuple[float | None, ...]] = {
    32768: (19.6, 25.3, 15.9, 13.8),
    65536: (35.3, 45.9, 29.8, 23.2),
    131072: (OUT, OUT, 57.2, 46.6),
}
PUBLISHED_HEADLINE = {"source": "arXiv 2406.03488, abstract", "throughput": 1.14, "memory": 0.5}

RANKS = 4
TENSOR_PARALLEL = 8
SEGMENTS = 4
STAGES_PER_RANK = 2


@dataclass(frozen=True)
class Assumptions:
    """What the prediction stands on; one is varied at a time."""

    name: str = "as stated"
    accelerator: dict[str, Any] = field(default_factory=dict)
    """Fields of the A100 that differ."""
    link: str = "infiniband-200"
    tensor_link: str = "nvlink-a100"
    ranks: int = RANKS
    segments: int = SEGMENTS
    partition: str = "computation_wise"
    blocking: bool = False
    """Whether a rank computes nothing while what it waits for travels."""
    balanced: bool = False
    """Whether ranks with embedding or head have fewer layers; Megatron gives all as many."""

    def setting(self, length: int) -> Setting:
        return Setting(
            replace(named_shape("7b"), positions="rope"), length,
            replace(named_accelerator("a100"), **self.accelerator), named_link(self.link),
            Keeping("none", 2, keeps_activated=True), 1, 32 // self.ranks, named_link(self.tensor_link),
            partition=self.partition, megatron=True,
        )  # fmt: skip

    def families(self) -> dict[str, tuple[str, dict[str, Any]]]:
        cut, loops = {"segments": self.segments}, {"stages_per_rank": STAGES_PER_RANK}
        ends: dict[str, Any] = {} if self.balanced else {"ends": (0, 0)}
        families = ("1f1b", "interleaved", "seq1f1b", "seq1f1b_interleaved")
        options: tuple[dict[str, Any], ...] = ({}, loops, cut, cut | loops)
        return {method: (f, o | ends) for method, f, o in zip(METHODS, families, options, strict=True)}


def attention(forward: float, backward: float) -> dict[str, float]:
    return {"attention_efficiency": forward, "attention_backward_efficiency": backward}


VARIED = (
    Assumptions(),
    Assumptions("2 segments", segments=2),
    Assumptions("8 segments", segments=8),
    Assumptions("even segments", partition="even"),
    Assumptions("layers balanced against embedding and head", balanced=True),
    Assumptions("messages take no time", link="free"),
    Assumptions("messages are waited for, not overlapped", blocking=True),
    Assumptions("the same on 100 Gbit/s a rank", link="ethernet", blocking=True),
    Assumptions("starting a part takes no time", {"launch_s": 0.0}),
    Assumptions("starting a part takes 200 us", {"launch_s": 200e-6}),
    Assumptions("starting a part takes 400 us", {"launch_s": 400e-6}),
    Assumptions("attention reaches 0.40 of the peak, 0.35 backward", attention(0.4, 0.35)),
    Assumptions("p = 8, tensor parallel 4", ranks=8),
)  # fmt: skip


def blocking_s(found: Estimate) -> float:
    """The step where every action starts with the time its messages take."""
    waited = {
        step.action: sum(map(found.message_seconds, step.waits))
        for rank in found.program.ranks
        for step in rank
        if isinstance(step, Run)
    }
    return simulate_program(found.program, lambda action: found.seconds(action) + waited[action]).makespan_s


def row(length: int, microbatches: int, given: Assumptions | None = None) -> dict[str, Any]:
    """All methods at one length: tokens per second, the ratio to 1F1B, memory, and what of it fits."""
    given = given or VARIED[0]
    setting = given.setting(length)
    methods: dict[str, dict[str, Any]] = {}
    for at, (method, (family, options)) in enumerate(given.families().items()):
        found = estimate_family(setting, family, given.ranks, microbatches, **options)
        step_s = blocking_s(found) if given.blocking else found.timeline.makespan_s
        methods[method] = {
            "tokens_per_s": length * microbatches / step_s, "bubble_ratio": found.timeline.bubble_ratio,
            "peak_bytes": found.timeline.peak_bytes, "fits": found.peak_bytes <= setting.accelerator.memory_bytes,
            "published_tokens_per_s": PUBLISHED_TOKENS_PER_S[length, microbatches][at],
            "published_gb": PUBLISHED_GB[length][at],
        }  # fmt: skip
    first = methods["1F1B"]
    for each in methods.values():
        each["ratio"] = each["tokens_per_s"] / first["tokens_per_s"]
        each["memory_ratio"] = max(each["peak_bytes"]) / max(first["peak_bytes"])
        for key, value in (("ratio", "tokens_per_s"), ("memory_ratio", "gb")):
            mine, base = each[f"published_{value}"], first[f"published_{value}"]
            each[f"published_{key}"] = mine / base if mine and base else None
    cut = setting.segment_lengths(given.segments)
    return {"tokens": length, "microbatches": microbatches, "segment_lengths": cut, "methods": methods}


def side_by_side(lengths: Sequence[int] = LENGTHS) -> dict[str, float]:
    """Share that keys and values put side by side, kept per segment, add to the activations of a layer: by length.

    A public port of the authors' attention copies, for each segment, the keys and values of all so far; ours keeps each
    segment's once.
    """
    found = {}
    for length in lengths:
        cut = VARIED[0].setting(length).segment_lengths(SEGMENTS)
        found[f"{length // 1024}k"] = 2 * (sum(accumulate(cut)) - length) / (16 * length)
    return found


def number(value: float | None, digits: int = 0) -> str:
    return "out of memory" if value is None else f"{value:.{digits}f}"


def tables(result: dict[str, Any]) -> str:
    lines = [
        "| tokens | m | schedule | tokens/s predicted | published | predicted / published | over 1F1B predicted | "
        "published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in result["rows"]:
        for method, found in each["methods"].items():
            mine, theirs = found["tokens_per_s"], found["published_tokens_per_s"]
            share = f"{mine / theirs:.2f}" if theirs else "-"
            told = number(mine) + ("" if found["fits"] else ", out of memory")
            ratio, theirs_ratio = found["ratio"], found["published_ratio"]
            cells = [
                f"{each['tokens'] // 1024}k",
                each["microbatches"],
                method,
                told,
                number(theirs),
                share,
                f"{ratio:.3f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} | {f'{theirs_ratio:.3f}' if theirs_ratio else '-'} |")
    lines += [
        "", "| tokens | schedule | GB predicted, by rank | fullest | published | over 1F1B predicted | published |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for each in result["rows"]:
        if each["microbatches"] != MICROBATCHES[0]:
            continue
        for method, found in each["methods"].items():
            ranks = ", ".join(f"{peak / 1e9:.0f}" for peak in found["peak_bytes"])
            fullest = f"{max(found['peak_bytes']) / 1e9:.1f}" + ("" if found["fits"] else ", does not fit")
            ratio = found["published_memory_ratio"]
            theirs = number(found["published_gb"], 1)
            lines.append(
                f"| {each['tokens'] // 1024}k | {method} | {ranks} | {fullest} | {theirs} | "
                f"{found['memory_ratio']:.2f} | "
                f"{f'{ratio:.2f}' if ratio else '-'} |"
            )
    columns = " | ".join(f"{method} {length}" for length in ("32k", "64k") for method in METHODS[1:])
    lines += ["", f"| assumption, m = 8 | {columns} | 1F1B, m 8 to 16, 32k |"]
    lines += ["| --- " * (2 + 2 * len(METHODS[1:])) + "|"]
    for each in result["varied"]:
        ratios = [f"{each[key][m]:.3f}" for key in ("32k", "64k") for m in METHODS[1:]]
        lines.append(f"| {each['assumption']} | {' | '.join(ratios)} | {each['gain_of_microbatches']:.3f} |")
    return "\n".join(lines)


def vary(assumptions: Sequence[Assumptions] = VARIED) -> list[dict[str, Any]]:
    """Ratios to 1F1B at 32k and 64k, m = 8, and what twice the micro-batches bring 1F1B: the published come first."""
    rows = []
    for given in assumptions:
        found = {f"{k}k": row(k * 1024, 8, given)["methods"] for k in (32, 64)}
        few, many = found["32k"]["1F1B"], row(32768, 16, given)["methods"]["1F1B"]
        for name, prefix in (("published", "published_"), (given.name, "")):
            ratios = {key: {m: each[f"{prefix}ratio"] for m, each in by.items()} for key, by in found.items()}
            gain = many[f"{prefix}tokens_per_s"] / few[f"{prefix}tokens_per_s"]
            rows.append({"assumption": name, "gain_of_microbatches": gain, **ratios})
    return rows[:2] + [each for each in rows[2:] if each["assumption"] != "published"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    result = {
        "published": PUBLISHED_HEADLINE, "sources": [PUBLISHED_SOURCE, PUBLISHED_MEMORY_SOURCE],
        "rows": [row(length, m) for length in LENGTHS for m in MICROBATCHES],
        "varied": vary(), "keys_side_by_side": side_by_side(),
    }  # fmt: skip
    print(json.dumps(result, indent=2) if args.json else tables(result))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
