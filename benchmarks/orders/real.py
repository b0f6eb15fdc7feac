"""Orders built from costs, for real: `python benchmarks/orders/real.py [--only documents | windows]`

2 ranks, one core and one thread each, every contender in the same rounds, beside the perfect split: one core that does all of a step,
nothing sent, in half the time.

documents    every step another batch of documents (the laws of benchmarks/documents): constructed builds each step's own order while
             the one before runs, by FLOPs and by a profile that is measured first
windows      layers that see a window and all by turns: every step alike
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "documents"))

import torch
import torch.distributed as dist
from peers import interleaved, launch, machine
from run import LAWS, RANKS, SHORT, Law, alone, batch_of, readings, small

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping, Lengths
from helixpipe.predict.estimate import Setting
from helixpipe.predict.profile import Profile, Timing, merged
from helixpipe.predict.steps import order_of_steps
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.profiling import WARMUP, Parts, default_cuts, measure_link

ROUNDS = 5
"""Of a profile."""
SPLIT = "perfect split"


@dataclass(frozen=True)
class Contender:
    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    by_profile: bool = False
    """Whether its costs are measured ones, or FLOPs."""


V = {"placement": "v", "stages_per_rank": 2}
NAMED = (
    Contender("1f1b", "1f1b"),
    Contender("zb_v", "zb_v"),
    Contender("seq1f1b, 4 segments", "seq1f1b", {"segments": 4}),
    Contender("seq1f1b_zb, 4 segments", "seq1f1b_zb", {"segments": 4}),
    Contender("seq1f1b_interleaved, 2 segments", "seq1f1b_interleaved", {"segments": 2, "stages_per_rank": 2}),
    Contender("helix, 2 folds", "helix", {"folds": 2, "travel": "qkv"}),
)
BUILT = (
    Contender("constructed, v", "constructed", V),
    Contender("constructed, v, memory 4", "constructed", V | {"memory": "4"}),
    Contender("constructed, v, memory 4, by a profile", "constructed", V | {"memory": "4"}, by_profile=True),
    Contender("constructed, line, 4 segments", "constructed", {"placement": "line", "segments": 4}),
)
"""zb_v keeps 2 micro-batches' on a rank, as constructed does that is not told; helix of 2 folds 4."""


def pipeline_of(each: Contender, shape: ModelShape, args: argparse.Namespace, profile: Profile | None) -> Pipeline:
    """As training makes it."""
    setting = Setting(
        shape, args.length, keeping=Keeping("none", 4), profile=profile if each.by_profile else None
    ).of_family(each.family)
    options = each.options | ({"balance": "work"} if each.family == "helix" else {})
    schedule = setting.build(each.family, RANKS, args.microbatches, **options)

    def cut(length: int, documents: Lengths) -> tuple[int, ...]:
        return setting.segment_lengths(schedule.segments, documents)

    return Pipeline(
        Decoder(shape), schedule, recompute="none", segment_lengths=cut if schedule.segments > 1 else None,
        arrange=order_of_steps(setting, schedule, each.family, options),
    )  # fmt: skip


def profiled(shape: ModelShape, args: argparse.Namespace) -> Profile:
    """Measured on both ranks at once, sequences as short as documents too; the same on both."""
    parts, runs = Parts(shape, "cpu", torch.float32), list[Timing]()
    for turn in range(-WARMUP, ROUNDS):
        for cut in (*default_cuts(shape, args.length), *((args.length // n,) for n in SHORT)):
            dist.barrier()
            timings = list(parts.run(cut))
            runs += timings if turn >= 0 else []
    found: list[str] = [""] * RANKS
    dist.all_gather_object(found, parts.profile(runs).to_json())
    links: list[Any] = [measure_link("cpu")]
    dist.broadcast_object_list(links)
    return merged([Profile.from_json(text) for text in found], links[0])


def rounds(
    chosen: Sequence[Contender],
    pipelines: dict[str, Pipeline],
    reference: Pipeline,
    args: argparse.Namespace,
    documents: Callable[[int], Lengths | None],
) -> dict[str, dict[str, float]]:
    """Every contender takes the same steps; the program of the next one is made while each runs."""
    taken: dict[str, int] = dict.fromkeys((*pipelines, SPLIT), 0)

    def step(name: str, pipeline: Pipeline) -> None:
        taken[name] += 1
        pipeline.prepare(args.microbatches, args.length, documents(taken[name] + 1))
        pipeline.zero_gradients()
        pipeline.step(*batch_of(args, taken[name]), documents=documents(taken[name]))

    steps = {each.name: lambda n=each.name: step(n, pipelines[n]) for each in chosen}
    steps[SPLIT] = lambda: step(SPLIT, reference)
    seconds = interleaved(steps, args.steps, warmup=1)
    return {
        name: {"over_split": sum(took) * RANKS / sum(seconds[SPLIT]), "median_s": statistics.median(took)}
        for name, took in seconds.items()
        if name != SPLIT
    }


def worker(rank: int, args: argparse.Namespace) -> None:
    plain = small(args)
    shapes = {
        "documents": plain,
        "windows": replace(plain, layers=args.window_layers, window=args.window, window_pattern=(True, False)),
    }
    result: dict[str, Any] = {"machine": machine(), "rows": {}}
    for part, shape in shapes.items():
        if args.only not in ("", part):
            continue
        chosen = [each for each in (*NAMED, *BUILT) if each.name in (args.contenders or each.name).split("|")]
        profile = profiled(shape, args) if any(each.by_profile for each in chosen) and part == "documents" else None
        chosen = [each for each in chosen if profile is not None or not each.by_profile]
        pipelines = {each.name: pipeline_of(each, shape, args, profile) for each in chosen}
        reference = alone(shape, args)
        for law, (median, sigma, fills) in LAWS.items() if part == "documents" else ((part, (0.0, 0.0, 0.0)),):
            if args.law not in law and part == "documents":
                continue
            drawn = Law(law, median * args.length, sigma, fills)
            read = readings(shape, drawn, args.length, args.microbatches, args.seed)["documents"] if median else None
            documents = read.documents if read else lambda step: None
            rows = result["rows"][law] = rounds(chosen, pipelines, reference, args, documents)
            if rank == 0:
                told = ", ".join(f"{name} {row['over_split']:.3f}" for name, row in rows.items())
                print(f"{law}: {told}", file=sys.stderr, flush=True)
        for each in (*pipelines.values(), reference):
            each.close()
    if rank == 0:
        result |= {key: getattr(args, key) for key in ("layers", "hidden", "length", "microbatches", "steps", "window")}
        print(json.dumps(result, indent=2) if args.json else table(result))


def table(result: dict[str, Any]) -> str:
    of = result["rows"]
    lines = [
        f"{result['machine']}. h={result['hidden']} s={result['length']} m={result['microbatches']}, {result['steps']} steps",
        "",
        f"| over the perfect split | {' | '.join(of)} |",
        "| --- |" + " --- |" * len(of),
    ]
    for name in dict.fromkeys(name for rows in of.values() for name in rows):
        cells = (f"{rows[name]['over_split']:.3f}" if name in rows else "" for rows in of.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--window-layers", type=int, default=6)
    parser.add_argument("--only", choices=("documents", "windows", ""), default="")
    parser.add_argument("--law", default="", help="of documents: a word of its name")
    parser.add_argument("--contenders", default="", help="those to run: names, with | between")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.bidirectional = False
    launch(RANKS, worker, args)


if __name__ == "__main__":
    main()
