"""Is a predicted step the measured one? `python benchmarks/predicted_vs_measured/run.py`

2 ranks, one core and one thread each. In every round both ranks time the parts of a layer at once, and run a step of
every family. A profile of all rounds then prices each family's program, which is simulated. Compared, as predicted over
measured: the quickest step (its start to the last action's end) with a profile of the quickest runs, which is what a
machine does when it is left alone; the median of both; and the most bytes of activations kept on each rank.

With --processor-time, actions and parts are timed in seconds of their thread, which other programs on the machine do not
count into. Waits have none, so only the sum over all actions is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from peers import interleaved, launch, machine, predicted_step

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.profile import Profile, Timing, merged
from helixpipe.predict.timeline import Timeline
from helixpipe.runtime import recorder
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.profiling import WARMUP, Parts, default_cuts, measure_link
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.partition import from_costs

RANKS = 2
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "1f1b": ("1f1b", {}),
    "interleaved": ("interleaved", {"stages_per_rank": 2}),
    "seq1f1b": ("seq1f1b", {"segments": 4}),
    "helix, nothing travels": ("helix", {"travel": "none"}),
    "helix, qkv travels": ("helix", {"travel": "qkv"}),
    "helix, attention travels": ("helix", {"travel": "attention"}),
}
POLICIES = ("none", "selective")


@dataclass
class Contender:
    """A family under a policy: its pipeline and what its steps took."""

    name: str
    recompute: str
    pipeline: Pipeline
    batch: Batch
    timelines: list[Timeline]


def gathered(mine: Profile) -> Profile:
    """One profile of what every rank measured; the same on all."""
    found: list[str] = [""] * RANKS
    dist.all_gather_object(found, mine.to_json())
    return merged([Profile.from_json(text) for text in found], measure_link("cpu"))


def contender(shape: ModelShape, args: argparse.Namespace, profile: Profile, name: str, recompute: str) -> Contender:
    family, options = FAMILIES[name]
    schedule = build_schedule(family, ranks=RANKS, layers=shape.layers, microbatches=args.microbatches, **options)
    lengths = None
    if schedule.segments > 1:
        lengths = from_costs(args.length, schedule.segments, profile.partition_seconds(recompute), 64)
    pipeline = Pipeline(Decoder(shape), schedule, recompute=recompute, segment_lengths=lengths)
    return Contender(name, recompute, pipeline, Batch(1, lengths or (args.length,)), [])


def row(each: Contender, best: Profile, middle: Profile) -> dict[str, Any]:
    """The quickest step against a profile of the quickest runs, and the median step against that of all medians."""
    steps = sorted(each.timelines, key=lambda timeline: timeline.makespan_s)
    quick, usual = predicted(each, best), predicted(each, middle)
    return {
        "quickest_s": steps[0].makespan_s, "predicted_quickest_s": quick.makespan_s,
        "quickest_busy_s": sum(steps[0].busy_s), "predicted_quickest_busy_s": sum(quick.busy_s),
        "median_s": statistics.median(step.makespan_s for step in steps), "predicted_median_s": usual.makespan_s,
        "median_busy_s": statistics.median(sum(step.busy_s) for step in steps), "predicted_median_busy_s": sum(usual.busy_s),
        "slowest_s": steps[-1].makespan_s,
        "peak_bytes": list(steps[0].peak_activation_bytes),
        "predicted_peak_bytes": list(quick.peak_activation_bytes),
    }  # fmt: skip


def predicted(each: Contender, profile: Profile) -> Timeline:
    """A step, messages and all, with live bytes."""
    return predicted_step(each.pipeline.program(each.batch), profile, Keeping(each.recompute, 4))


def worker(rank: int, args: argparse.Namespace) -> None:
    if args.processor_time:
        recorder.time = SimpleNamespace(perf_counter=time.thread_time)
    shape = ModelShape(
        layers=args.layers, hidden=args.hidden, heads=args.heads, ffn=4 * args.hidden, vocabulary=256,
        mlp="gelu", norm="layer",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(256, (args.microbatches, args.length), generator=generator) for _ in range(2))
    parts, cuts = Parts(shape, "cpu", torch.float32), default_cuts(shape, args.length)
    runs: list[list[list[Timing]]] = []  # per round and cut

    def profile_round() -> None:
        runs.append([])
        for cut in cuts:
            dist.barrier()
            runs[-1].append(list(parts.run(cut)))

    for _ in range(WARMUP):
        profile_round()
    first = gathered(parts.profile(list(chain.from_iterable(runs.pop()))))
    runs.clear()
    contenders = [contender(shape, args, first, name, policy) for policy in POLICIES for name in FAMILIES]

    def step(each: Contender) -> None:
        each.pipeline.zero_gradients()
        each.pipeline.step(tokens, targets)
        each.timelines.append(each.pipeline.timeline())

    steps = {f"{c.name} {c.recompute}": lambda c=c: step(c) for c in contenders}
    interleaved({"profile": profile_round, **steps}, args.rounds, warmup=1)
    runs.pop(0)  # the warm-up's
    middle = gathered(parts.profile([timing for turn in runs for run in turn for timing in run]))
    quickest = [min(turns, key=lambda run: sum(timing.seconds for timing in run)) for turns in zip(*runs, strict=True)]
    best = gathered(parts.profile(list(chain.from_iterable(quickest))))
    if rank:
        return
    rows = {}
    for each in contenders:
        each.timelines.pop(0)  # the warm-up's
        rows[f"{each.name}; {each.recompute}"] = row(each, best, middle)
    keys = ("layers", "hidden", "heads", "length", "microbatches", "rounds")
    turns = [sum(timing.seconds for run in turn for timing in run) for turn in runs]
    link = {"bytes_per_s": best.link.bytes_per_s, "latency_s": best.link.latency_s} if best.link else {}
    result = {"machine": machine(), **{key: getattr(args, key) for key in keys}, "rows": rows}
    result |= {"worst_fit_error": best.worst_error, "profile_rounds_s": turns, "link": link}
    if args.profile:
        best.save(args.profile)
    print(json.dumps(result, indent=2) if args.json else (actions_table if args.processor_time else table)(result))


def head(result: dict[str, Any]) -> str:
    """The machine, what ran, and how steady it was."""
    link, turns = result["link"], result["profile_rounds_s"]
    return (
        f"{result['machine']}. L={result['layers']} h={result['hidden']} s={result['length']} m={result['microbatches']}, "
        f"{result['rounds']} rounds. The same parts took {min(turns):.2f} to {max(turns):.2f} s a round; worst fit error "
        f"{result['worst_fit_error']:.0%}; link {link['bytes_per_s'] / 1e9:.2f} GB/s, {link['latency_s'] * 1e6:.0f} us"
    )


def actions_table(result: dict[str, Any]) -> str:
    lines = [
        head(result),
        "",
        "| schedule; recompute | all actions, s | predicted | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        ratio = row["predicted_median_busy_s"] / row["median_busy_s"]
        lines.append(f"| {name} | {row['median_busy_s']:.3f} | {row['predicted_median_busy_s']:.3f} | {ratio:.3f} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    lines = [
        head(result),
        "",
        "| schedule; recompute | quickest step, s | predicted | ratio | in actions alone | median, s | ratio | peak bytes, ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        peaks = zip(row["predicted_peak_bytes"], row["peak_bytes"], strict=True)
        lines.append(
            f"| {name} | {row['quickest_s']:.3f} | {row['predicted_quickest_s']:.3f} | "
            f"{row['predicted_quickest_s'] / row['quickest_s']:.3f} | "
            f"{row['predicted_quickest_busy_s'] / row['quickest_busy_s']:.3f} | {row['median_s']:.3f} | "
            f"{row['predicted_median_s'] / row['median_s']:.3f} | {', '.join(f'{a / b:.3f}' for a, b in peaks)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (
        ("layers", 4), ("hidden", 128), ("heads", 2), ("length", 2048), ("microbatches", 4), ("rounds", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--profile", default="", help="write the profile measured here to this file")
    parser.add_argument(
        "--processor-time", action="store_true", help="compare actions alone, in seconds of their thread"
    )
    parser.add_argument("--json", action="store_true")
    launch(RANKS, worker, parser.parse_args())
