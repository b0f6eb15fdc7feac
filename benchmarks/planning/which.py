"""Which schedule when? `python benchmarks/planning/which.py`

A pipeline of 8 ranks, each of 8 accelerators of one node, 16 sequences a step, llama3-8b: for causal and bidirectional attention,
lengths, links, memory and vocabulary the best schedule of each group of families, by the planner's own search (its bounds
prove that no other of the group is faster), and the best layout without a pipeline. Ratios are to the fastest pipeline.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace

from helixpipe.errors import ConfigError
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.layouts import Asked
from helixpipe.predict.nodes import Nodes
from helixpipe.predict.search import search

GROUPS = {
    "whole sequences": ("1f1b", "interleaved"),
    "zero bubble": ("zb_h1", "zb_h2", "zb_v", "v_half", "dualpipe_v"),
    "segments": ("seq1f1b", "seq1f1b_interleaved", "seq1f1b_zb"),
    "helix": ("helix",),
}
RANKS, GROUP, SEQUENCES = 8, 8, 16


@dataclass(frozen=True)
class Case:
    length: int
    causal: bool = True
    link: str = "infiniband"
    memory_gib: float = 68.5
    vocabulary: int = 128256

    def __str__(self) -> str:
        told = [f"{self.length // 1024}k", "causal" if self.causal else "bidirectional"]
        told += [self.link] * (self.link != "infiniband") + [f"{self.memory_gib:g} GiB"] * (self.memory_gib != 68.5)
        return ", ".join([*told, *[f"{self.vocabulary:,} words"] * (self.vocabulary != 128256)])

    def asked(self) -> Asked:
        shape = replace(named_shape("llama3-8b"), causal=self.causal, vocabulary=self.vocabulary)
        h100, across = named_accelerator("h100"), named_link(self.link)
        setting = Setting(shape, self.length, h100, across, Keeping("none", 2, device="cuda"))
        nodes = Nodes(GROUP, named_link(h100.tensor_link), across)
        return Asked(setting, RANKS * GROUP, SEQUENCES, self.memory_gib * 2**30, nodes, microbatch_size=1)


CASES = (
    Case(32768),
    Case(131072),
    Case(524288),
    Case(32768, causal=False),
    Case(131072, causal=False),
    Case(131072, link="ethernet"),
    Case(131072, causal=False, link="ethernet"),
    Case(131072, memory_gib=30),
    Case(131072, vocabulary=32000),
)


def best(asked: Asked, processes: int) -> tuple[str, float, float] | None:
    """The fastest in words, its seconds and GiB; None where nothing fits, or can be."""
    try:
        rows = search(asked, 1, processes).rows
    except ConfigError:
        return None
    if not rows:
        return None
    row = rows[0]
    told = (
        row.schedule_told
        if row.layout.mesh.pp > 1
        else ", ".join([str(row.layout), *row.layout.told, row.candidate.kept])
    )
    return told, row.step_s, row.peak_bytes / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--cases", default="", help="numbers, comma separated")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chosen = [CASES[int(number)] for number in args.cases.split(",")] if args.cases else CASES
    found = {}
    for case in chosen:
        print(case, file=sys.stderr, flush=True)
        pipeline = replace(case.asked(), pp=RANKS, dp=1, cp=1, tp=GROUP)
        each = {name: best(replace(pipeline, families=families), args.processes) for name, families in GROUPS.items()}
        each["no pipeline"] = best(replace(case.asked(), pp=1), args.processes)
        found[str(case)] = each
        if not args.json:
            print("\n".join(rows(str(case), each)), flush=True)
    if args.json:
        print(json.dumps(found, indent=2))


def rows(case: str, each: dict[str, tuple[str, float, float] | None]) -> list[str]:
    fastest = min(told[1] for name, told in each.items() if told is not None and name != "no pipeline")
    return [
        f"| {case} | {name} | "
        + (
            "does not fit, or cannot be | | |"
            if told is None
            else f"{told[0]} | {told[1]:.2f} | {told[1] / fastest:.3f} | {told[2]:.1f} |"
        )
        for name, told in each.items()
    ]


if __name__ == "__main__":
    main()
