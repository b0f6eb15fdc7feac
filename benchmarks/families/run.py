"""Every family of ours beside torch's schedules, in one interleaved run. `python benchmarks/families/run.py`

2 ranks, one core and one thread each; attention-heavy; the same model, weights and data. For each: time over the
perfect two-way split (each rank half of the micro-batches, no messages; timed before and after every few schedules),
and two readings of memory on each rank, of steps that are not timed: the most bytes of activations that autograd kept at
one time, counted by storage in the same way for all, and the most bytes on the heap beyond what stood before the step,
messages, workspaces and all (`benchmarks/heap.py`). Ours and torch's of one name run in every round, as ours, torch's,
torch's, ours, and `seq1f1b_interleaved` twice, which is to be fast in little memory; the rest in every third.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import heap
import torch
import torch.distributed as dist
from peers import PlainParts, interleaved_beside, launch, machine, paired, split_step
from torch_pipelines import TORCH, TorchPipeline

from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import FAMILIES, build_schedule
from helixpipe.schedule.partition import even, for_shape

RANKS = 2
SPLIT = "perfect split"

# the options with which each family runs here; 2 stages a rank where it interleaves; `evenness`: see partition.computation_wise
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpipe": ("gpipe", {}),
    "1f1b": ("1f1b", {}),
    "interleaved": ("interleaved", {"stages_per_rank": 2}),
    "breadth_first": ("breadth_first", {"stages_per_rank": 2}),
    "zb_h1": ("zb_h1", {}),
    "zb_h2": ("zb_h2", {}),
    "zb_v": ("zb_v", {}),
    "v_half": ("v_half", {}),
    "v_min": ("v_min", {}),
    "dualpipe_v": ("dualpipe_v", {}),
    "seq1f1b": ("seq1f1b", {"segments": 8}),
    "seq1f1b_interleaved": ("seq1f1b_interleaved", {"segments": 5, "stages_per_rank": 2}),
    "seq1f1b_interleaved, k=6": ("seq1f1b_interleaved", {"segments": 6, "stages_per_rank": 2}),
    "seq1f1b_interleaved, k=8, evenness 0.3": (
        "seq1f1b_interleaved",
        {"segments": 8, "stages_per_rank": 2, "evenness": 0.3},
    ),
    "seq1f1b_zb": ("seq1f1b_zb", {"segments": 8}),
    "terapipe": ("terapipe", {"segments": 4}),
    "slimpipe": ("slimpipe", {"segments": 4, "stages_per_rank": 2}),
    "helix, nothing travels": ("helix", {"travel": "none"}),
    "helix, qkv travels": ("helix", {"travel": "qkv"}),
    "helix, attention travels": ("helix", {"travel": "attention"}),
}
SAME = {
    "1f1b": "torch 1F1B", "interleaved": "torch Interleaved1F1B", "zb_v": "torch ZBVZeroBubble",
}  # fmt: skip
LEAN = "seq1f1b_interleaved"
"""The one that is to be fast in little memory."""


@dataclass
class Contender:
    step: Callable[[], float]
    peak_bytes: Callable[[], int]
    """Runs a step; the most bytes of activations kept at one time on this rank."""
    heap_bytes: Callable[[], int]
    """Runs one more, onto its gradients; the most bytes on the heap beyond what stood before it."""


def our_contender(shape: ModelShape, m: int, tokens: torch.Tensor, targets: torch.Tensor, name: str) -> Contender:
    family, options = OURS[name]
    cut = {key: options[key] for key in options if key == "evenness"}
    given = {key: options[key] for key in options if key != "evenness"}
    schedule = build_schedule(family, ranks=RANKS, layers=shape.layers, microbatches=m, **given)
    lengths = None
    if family == "slimpipe":  # uniform by definition
        lengths = even(tokens.shape[1], schedule.segments, 64)
    elif schedule.segments > 1:
        lengths = for_shape(shape, tokens.shape[1], schedule.segments, 64, **cut)
    pipeline = Pipeline(Decoder(shape), schedule, recompute="none", segment_lengths=lengths)

    def step() -> float:
        pipeline.zero_gradients()
        return pipeline.step(tokens, targets)

    def peak_bytes() -> int:
        step()
        return pipeline.timeline().peak_activation_bytes[dist.get_rank()]

    def heap_bytes() -> int:
        return heap.over_before(lambda: pipeline.step(tokens, targets))

    return Contender(step, peak_bytes, heap_bytes)


def torch_contender(shape: ModelShape, m: int, tokens: torch.Tensor, targets: torch.Tensor, name: str) -> Contender:
    pipeline = TorchPipeline(shape, m, tokens, targets, name)

    def step() -> float:
        pipeline.zero_gradients()
        return pipeline.step()

    def heap_bytes() -> int:
        pipeline.let_go()
        return heap.over_before(pipeline.step) + pipeline.buffer_bytes

    return Contender(step, lambda: kept_bytes(pipeline.modules, step), heap_bytes)


def kept_bytes(modules: list[PlainParts], step: Callable[[], float]) -> int:
    """Runs the step; the most bytes that autograd kept at one time, weights left out."""
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    ledger = Ledger(lambda pointer: pointer in weights)
    with ledger.graphs():
        step()
    return ledger.high.kept_bytes


def split_contender(shape: ModelShape, tokens: torch.Tensor, targets: torch.Tensor) -> Contender:
    whole = PlainParts(shape, range(shape.layers))

    def step() -> float:
        return split_step(whole, tokens, targets)

    def heap_bytes() -> int:
        return heap.over_before(lambda: split_step(whole, tokens, targets, fresh=False))

    return Contender(step, lambda: kept_bytes([whole], step), heap_bytes)


def worker(rank: int, args: argparse.Namespace) -> None:
    shape = ModelShape(
        layers=args.layers, hidden=args.hidden, heads=args.heads, ffn=4 * args.hidden, vocabulary=256,
        mlp="gelu", norm="layer",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    m = args.microbatches
    data = tuple(torch.randint(256, (m, args.length), generator=generator) for _ in range(2))
    names = [n for n in OURS if OURS[n][0] in FAMILIES and not (OURS[n][0] == "dualpipe_v" and m < 2 * RANKS)]
    names += TORCH
    if args.only:
        words = args.only.split(",")
        names = [n for n in names if any(word == n if word in names else word in n for word in words)]
    OURS[LEAN][1]["segments"] = args.segments
    contenders = {n: (our_contender if n in OURS else torch_contender)(shape, m, *data, n) for n in names}
    split = split_contender(shape, *data)
    peaks: dict[str, dict[str, list[int]]] = {}
    for name, contender in {**contenders, SPLIT: split}.items():
        found = {"peak_activation_bytes": contender.peak_bytes()}
        if args.heap:
            found["peak_heap_bytes"] = contender.heap_bytes()
        peaks[name] = {what: everyones(mine) for what, mine in found.items()}
    steps = {name: contender.step for name, contender in contenders.items()}
    seconds, splits = interleaved_beside(split.step, steps, groups(names, args.rounds))
    if rank:
        return
    result = summary(args, shape, seconds, splits, peaks)
    print(json.dumps(result, indent=2) if args.json else table(result))


def everyones(mine: int) -> list[int]:
    """A number of each rank."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
    dist.all_gather(found, torch.tensor([mine]))
    return [int(each) for each in found]


def groups(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Who runs between two timings of the split, for all rounds.

    What is compared most closely, twice in every round: ours and torch's of one name, and the lean one against the split.
    Of the others each every third round. The order turns from round to round.
    """
    close = [[ours, peer, peer, ours] for ours, peer in SAME.items() if ours in names and peer in names]
    close += [[LEAN, LEAN]] * (LEAN in names)
    others = [name for name in names if not any(name in group for group in close)]
    for turn in range(rounds):
        mine = others[turn % 3 :: 3]
        order = close + [mine[i : i + 3] for i in range(0, len(mine), 3)]
        yield from order[turn % len(order) :] + order[: turn % len(order)]


def summary(
    args: argparse.Namespace,
    shape: ModelShape,
    seconds: dict[str, list[float]],
    splits: dict[str, list[float]],
    peaks: dict[str, dict[str, list[int]]],
) -> dict[str, Any]:
    flops = dict.fromkeys(("attn", "rest"), 0.0)
    for part in chain(shape.layers):
        flops["attn" if part.kind == "attn" else "rest"] += shape.forward_flops(part, Batch(1, (args.length,)), 0)
    rows: dict[str, dict[str, Any]] = {}
    for name, split in {**splits, SPLIT: [each for some in splits.values() for each in some]}.items():
        took = seconds.get(name, split)
        middle, low, high = paired(took, split)
        rows[name] = {
            "median_s": statistics.median(took), "over_perfect_split": middle, "range": [low, high],
            "times": len(took), **peaks[name],
        }  # fmt: skip
        if name in SAME and SAME[name] in seconds:
            rows[name]["over_same_of_torch"] = paired(took, seconds[SAME[name]])[0]
    keys = ("layers", "hidden", "heads", "length", "microbatches", "rounds", "segments")
    share = flops["attn"] / sum(flops.values())
    return {"machine": machine(), **{k: getattr(args, k) for k in keys}, "attention_share": share, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Each ratio as the median of pairs, and in brackets as the ratio of the two medians."""
    rows = result["rows"]
    lines = [
        f"{result['machine']}. L={result['layers']} h={result['hidden']} s={result['length']} m={result['microbatches']}, "
        f"attention {result['attention_share']:.0%} of forward FLOPs, {result['segments']} segments, {result['rounds']} rounds",
        "",
        "| schedule | over the perfect split | range | times | over torch's same | peak activations, MiB, rank 0 and 1 | "
        "peak heap |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def both(name: str, pairs: str, over: str) -> str:
        of_medians = rows[name]["median_s"] / rows[over]["median_s"]
        return f"{rows[name][pairs]:.3f} ({of_medians:.3f})"

    for name, row in sorted(rows.items(), key=lambda item: float(item[1]["over_perfect_split"])):
        low, high = row["range"]
        kept, held = (
            ", ".join(f"{peak / 2**20:.0f}" for peak in row.get(f"peak_{what}_bytes", ()))
            for what in ("activation", "heap")
        )
        split = both(name, "over_perfect_split", SPLIT)
        same = both(name, "over_same_of_torch", SAME[name]) if "over_same_of_torch" in row else ""
        lines.append(f"| {name} | {split} | {low:.3f} to {high:.3f} | {row['times']} | {same} | {kept} | {held} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (
        ("layers", 4),
        ("hidden", 128),
        ("heads", 2),
        ("length", 4096),
        ("microbatches", 4),
        ("rounds", 5),
        ("segments", 5),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"of {LEAN}" * (flag == "segments") or None)
    parser.add_argument("--only", default="", help="comma separated: names of contenders, or words that are in theirs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error(f"--rounds {arguments.rounds}: at least 3, as some run in every third only")
    arguments.heap = not heap.why_not()
    if not arguments.heap:
        print(heap.why_not(), file=sys.stderr)
    with heap.metered() if arguments.heap else nullcontext():
        launch(RANKS, worker, arguments)
