"""Seq1F1B predicted beside what its authors measured.

    python benchmarks/paper_seq1f1b/run.py           # the tables
    python benchmarks/paper_seq1f1b/run.py --write   # the same, put into README.md beside this file

Tokens per second of their 7B model on 32 A100; memory of their four models, and what does not fit. What they published stands
in seq1f1b_authors.py; every other number is predicted: the schedule is built, lowered and simulated, messages and all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from seq1f1b_authors import (
    FULLEST_SOURCE,
    HEADLINE,
    LAYOUT_SOURCE,
    MEAN_SOURCE,
    METHODS,
    MODELS,
    SPEED_SOURCE,
    TOKENS_PER_S,
    Model,
)
from seq1f1b_memory import grain, grain_table, in_short, memory_row, memory_table, number, varied_memory_table

from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Estimate, Setting, estimate_family
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.simulate import simulate_program
from helixpipe.schedule.program import Run

SEVEN = MODELS["7B"]
LENGTHS = tuple(SEVEN.fullest_gib)
MICROBATCHES = (8, 16)
SEGMENTS = 4
STAGES_PER_RANK = 2
PAGE = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Assumptions:
    """What the prediction stands on; one is varied at a time."""

    name: str = "as stated"
    accelerator: dict[str, Any] = field(default_factory=dict)
    """Fields of the A100 that differ."""
    link: str = "infiniband-200"
    tensor_link: str = "nvlink-a100"
    ranks: int = 0
    """p, on as many accelerators; 0 is the authors'."""
    segments: int = SEGMENTS
    stages: int = STAGES_PER_RANK
    """A rank's, where schedules are interleaved."""
    partition: str = "computation_wise"
    blocking: bool = False
    """Whether a rank computes nothing while what it waits for travels."""
    balanced: bool = False
    """Whether ranks with embedding or head have fewer layers; Megatron gives all as many."""
    copied: bool = False
    """Whether bytes count the second copy of keys and values that the authors' attention keeps."""

    def setting(self, length: int, model: Model = SEVEN) -> Setting:
        return Setting(
            model.shape, length,
            replace(named_accelerator("a100"), **self.accelerator), named_link(self.link),
            Keeping("none", 2, device="cuda", keeps_activated=True), 1,
            model.accelerators // self.ranks if self.ranks else model.tensor_parallel, named_link(self.tensor_link),
            partition=self.partition, megatron=True,
        )  # fmt: skip

    def estimates(self, length: int, microbatches: int, model: Model = SEVEN) -> dict[str, Estimate]:
        """All methods at one length, in the order of METHODS."""
        setting = self.setting(length, model)
        cut, loops = {"segments": self.segments}, {"stages_per_rank": self.stages}
        ends: dict[str, Any] = {} if self.balanced else {"ends": (0, 0)}
        families = ("1f1b", "interleaved", "seq1f1b", "seq1f1b_interleaved")
        options: tuple[dict[str, Any], ...] = ({}, loops, cut, cut | loops)
        return {
            method: estimate_family(setting, family, self.ranks or model.ranks, microbatches, **(own | ends))
            for method, family, own in zip(METHODS, families, options, strict=True)
        }


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

VARIED_MEMORY = (
    Assumptions(),
    Assumptions("keys and values kept twice", copied=True),
    Assumptions("2 segments", segments=2),
    Assumptions("8 segments", segments=8),
    Assumptions("even segments", partition="even"),
    Assumptions("4 stages a rank", stages=4),
)
VARIED_AT = (("2.7B", 16384), ("7B", 65536))


def blocking_s(found: Estimate) -> float:
    """The step where every action starts with the time its messages take."""
    waited = {
        step.action: sum(map(found.message_seconds, step.waits))
        for rank in found.program.ranks
        for step in rank
        if isinstance(step, Run)
    }
    return simulate_program(found.program, lambda action: found.seconds(action) + waited[action]).makespan_s


def row(length: int, microbatches: int, given: Assumptions = VARIED[0]) -> dict[str, Any]:
    """All methods of 7B at one length: tokens per second, the ratio to 1F1B, and what of it fits."""
    methods: dict[str, dict[str, Any]] = {}
    for at, (method, found) in enumerate(given.estimates(length, microbatches).items()):
        step_s = blocking_s(found) if given.blocking else found.timeline.makespan_s
        methods[method] = {
            "tokens_per_s": length * microbatches / step_s, "bubble_ratio": found.timeline.bubble_ratio,
            "peak_bytes": found.timeline.peak_bytes, "fits": found.peak_bytes <= found.setting.accelerator.memory_bytes,
            "published_tokens_per_s": TOKENS_PER_S[length, microbatches][at],
        }  # fmt: skip
    first = methods["1F1B"]
    for each in methods.values():
        each["ratio"] = each["tokens_per_s"] / first["tokens_per_s"]
        mine, base = each["published_tokens_per_s"], first["published_tokens_per_s"]
        each["published_ratio"] = mine / base if mine and base else None
    cut = given.setting(length).segment_lengths(given.segments)
    return {"tokens": length, "microbatches": microbatches, "segment_lengths": cut, "methods": methods}


def memory(model: Model, length: int, given: Assumptions = VARIED_MEMORY[0]) -> dict[str, Any]:
    """GiB of all methods of one model at one length."""
    found = given.estimates(length, model.microbatches, model)
    return memory_row(model, length, found, given.copied) | {"assumption": given.name}


def all_memory() -> list[dict[str, Any]]:
    return [memory(model, length) for model in MODELS.values() for length in model.fullest_gib]


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| tokens | m | schedule | tokens/s predicted | published | predicted / published | over 1F1B predicted | "
        "published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        for method, found in each["methods"].items():
            mine, theirs = found["tokens_per_s"], found["published_tokens_per_s"]
            share = f"{mine / theirs:.2f}" if theirs else "-"
            told = number(mine, 0) + ("" if found["fits"] else ", out of memory")
            ratio, theirs_ratio = found["ratio"], found["published_ratio"]
            cells = [
                f"{each['tokens'] // 1024}k",
                each["microbatches"],
                method,
                told,
                number(theirs, 0),
                share,
                f"{ratio:.3f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} | {f'{theirs_ratio:.3f}' if theirs_ratio else '-'} |")
    return "\n".join(lines)


def varied_table(varied: Sequence[dict[str, Any]]) -> str:
    columns = " | ".join(f"{method} {length}" for length in ("32k", "64k") for method in METHODS[1:])
    lines = [f"| assumption, m = 8 | {columns} | 1F1B, m 8 to 16, 32k |"]
    lines += ["| --- " * (2 + 2 * len(METHODS[1:])) + "|"]
    for each in varied:
        ratios = [f"{each[key][m]:.3f}" for key in ("32k", "64k") for m in METHODS[1:]]
        lines.append(f"| {each['assumption']} | {' | '.join(ratios)} | {each['gain_of_microbatches']:.3f} |")
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """What stands on the page between marks of these names."""
    return {
        "memory in short": in_short(result["memory"]),
        "speed": speed_table(result["rows"]),
        "memory": memory_table(result["memory"]),
        "means": grain_table(MODELS.values()),
        "speed varied": varied_table(result["varied"]),
        "memory varied": varied_memory_table(result["varied_memory"]),
    }


def written(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks, `<!-- name -->` and `<!-- end of name -->`; ValueError where one is missing."""
    for name, table in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, begun, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not (begun and ended):
            raise ValueError(f"the page has no '{begin}' before an '{end}'; put both where the table goes")
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return page


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
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    args = parser.parse_args()
    began = time.perf_counter()
    result = {
        "published": HEADLINE, "sources": [SPEED_SOURCE, LAYOUT_SOURCE, FULLEST_SOURCE, MEAN_SOURCE],
        "rows": [row(length, m) for length in LENGTHS for m in MICROBATCHES], "varied": vary(),
        "memory": all_memory(), "means": grain(MODELS.values()),
        "varied_memory": [memory(MODELS[name], at, given) for name, at in VARIED_AT for given in VARIED_MEMORY],
    }  # fmt: skip
    found = tables(result)
    if args.write:
        try:
            PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        except ValueError as problem:
            parser.error(str(problem))
    print(json.dumps(result, indent=2) if args.json else "\n\n".join(found.values()))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
