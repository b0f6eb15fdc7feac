"""What does a vocabulary on all ranks bring? `python benchmarks/vocabulary/run.py [--record FILE]`

2 ranks, one core and one thread each; a model whose head is 30% of the FLOPs that a rank has in layers. Schedules of ours with head
and embedding on one rank each (`last`) and in shards on all (`spread`), and torch's, which know the first alone: seconds over the
perfect two-way split (each rank half of the micro-batches through the whole model, no messages), timed before and after each group.
`last` and `spread` of one family run one after the other, in turn. Peaks are the most bytes of activations that a step kept.
With --record each group is a line of a file as soon as it is timed, and what stands there is not timed again: a run that was cut
goes on.

Which rank has how many layers is the library's choice in both (`Setting.build`): a whole head has fewer layers beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from peers import PlainParts, interleaved_beside, launch, machine, paired, split_step
from torch_pipelines import TORCH, TorchPipeline

from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import ends, layer_parts
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.estimate import Setting
from helixpipe.runtime.pipeline import Pipeline

RANKS, MULTIPLE = 2, 64
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "1f1b": ("1f1b", {}),
    "interleaved, v=2": ("interleaved", {"stages_per_rank": 2}),
    "zb_v": ("zb_v", {}),
    "seq1f1b, k=4": ("seq1f1b", {"segments": 4}),
    "seq1f1b_interleaved, k=4, v=2": ("seq1f1b_interleaved", {"segments": 4, "stages_per_rank": 2}),
}


def vocabulary_of(shape: ModelShape, length: int, share: float) -> int:
    """Words with which the head has this share of the FLOPs of a rank's layers."""
    batch = Batch(1, (length,))
    layers = sum(shape.forward_flops(part, batch, 0) for part in layer_parts(0)) * shape.layers / RANKS
    per_word = shape.forward_flops(ends(shape.layers)[1], batch, 0) / shape.vocabulary
    return round(share * layers / per_word / MULTIPLE) * MULTIPLE


def shape_of(args: argparse.Namespace) -> ModelShape:
    sizes = {"layers": args.layers, "hidden": args.hidden, "heads": args.heads, "ffn": 4 * args.hidden}
    draft = ModelShape(**sizes, vocabulary=256, mlp="gelu", norm="layer")
    words = vocabulary_of(draft, args.length, args.share)
    return ModelShape(**sizes, vocabulary=words, mlp="gelu", norm="layer")


def ours(shape: ModelShape, args: argparse.Namespace, name: str, vocabulary: str) -> Pipeline:
    family, options = FAMILIES[name]
    setting = Setting(shape, args.length, keeping=Keeping("none", 4), segment_multiple=MULTIPLE)
    schedule = setting.build(family, RANKS, args.microbatches, **options, vocabulary=vocabulary)
    lengths = setting.segment_lengths(schedule.segments) if schedule.segments > 1 else None
    return Pipeline(Decoder(shape), schedule, recompute="none", segment_lengths=lengths)


def worker(rank: int, args: argparse.Namespace) -> None:
    shape, draw = shape_of(args), torch.Generator().manual_seed(0)
    tokens, targets = (
        torch.randint(shape.vocabulary, (args.microbatches, args.length), generator=draw) for _ in range(2)
    )
    whole = PlainParts(shape, range(shape.layers))
    expected = everyones(split_step(whole, tokens, targets), dist.ReduceOp.SUM)
    known = [json.loads(line) for line in args.record.read_text().splitlines()] if args.record.is_file() else []
    dist.barrier()
    steps: dict[str, Callable[[], float]] = {}
    peaks: dict[str, str] = {}
    for turn, group in groups(args):
        if any(line["turn"] == turn and set(line["seconds"]) == set(group) for line in known):
            continue
        for name in group:
            if name not in steps:
                steps[name], peaks[name] = contender(shape, args, name, tokens, targets)
                found = everyones(steps[name](), dist.ReduceOp.MAX)  # of torch's ranks one has it
                assert abs(found - expected) < 1e-4, (name, found, expected)  # one model, one loss
        each = {name: steps[name] for name in group}
        seconds, splits = interleaved_beside(lambda: split_step(whole, tokens, targets), each, [group])
        known.append({"turn": turn, "seconds": seconds, "splits": splits, "peaks": {n: peaks[n] for n in group}})
        if rank == 0 and args.record.name:
            with args.record.open("a") as record:
                record.write(json.dumps(known[-1]) + "\n")
    if rank == 0:
        tell(known, shape, args)


def contender(
    shape: ModelShape, args: argparse.Namespace, name: str, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[Callable[[], float], str]:
    """A step of a schedule, and the most MiB of activations that one kept on each rank, where it is ours."""
    pipeline: Any
    if name in TORCH:
        pipeline, given = TorchPipeline(shape, args.microbatches, tokens, targets, name), ()
    else:
        pipeline, given = ours(shape, args, *name.rsplit(", ", 1)), (tokens, targets)

    def step() -> float:
        pipeline.zero_gradients()
        return float(pipeline.step(*given))

    step()
    kept = [] if name in TORCH else pipeline.timeline().peak_activation_bytes
    return step, ", ".join(f"{each / 2**20:.0f}" for each in kept)


def tell(known: list[dict[str, Any]], shape: ModelShape, args: argparse.Namespace) -> None:
    """A table of all that was timed."""
    took: dict[str, list[float]] = {}
    splits: dict[str, list[float]] = {}
    peaks: dict[str, str] = {}
    for line in known:
        for name, seconds in line["seconds"].items():
            took.setdefault(name, []).extend(seconds)
            splits.setdefault(name, []).extend(line["splits"][name])
        peaks |= line["peaks"]
    print(
        f"{machine()}. L={shape.layers} h={shape.hidden} s={args.length} m={args.microbatches}, {shape.vocabulary} words, "
        f"head {args.share:.0%} of a rank's layers\n"
    )
    print(
        "| schedule | times | over the perfect split (of medians) | range | spread over last | peak activations, MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name in sorted(took, key=lambda name: (name in TORCH, list(took).index(name))):
        middle, low, high = paired(took[name], splits[name])
        of_medians = statistics.median(took[name]) / statistics.median(splits[name])
        last = took.get(name.removesuffix("spread") + "last", []) if name.endswith("spread") else []
        over = f"{paired(took[name], last)[0]:.3f}" if len(last) == len(took[name]) else ""
        print(
            f"| {name} | {len(took[name])} | {middle:.3f} ({of_medians:.3f}) | {low:.3f} to {high:.3f} | {over} | {peaks[name]} |"
        )


def everyones(mine: float, how: dist.ReduceOp.RedOpType) -> float:
    """Of what each rank has of the loss, the whole."""
    found = torch.tensor([mine])
    dist.all_reduce(found, how)
    return float(found)


def groups(args: argparse.Namespace) -> Iterator[tuple[int, list[str]]]:
    """Of each round, who runs between two timings of the split; the order turns from round to round."""
    words = [word for word in args.only.split(";") if word]
    for turn in range(args.rounds):
        each = [[f"{name}, last", f"{name}, spread"][:: 1 if turn % 2 else -1] for name in FAMILIES]
        each += [[name] for name in TORCH]
        each = [group for group in each if not words or any(group[0].startswith(word) for word in words)]
        at = turn % len(each)
        for group in each[at:] + each[:at]:
            yield turn, group


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (
        ("layers", 4), ("hidden", 128), ("heads", 2), ("length", 4096), ("microbatches", 8), ("rounds", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.3, help="of the head, beside a rank's layers")
    parser.add_argument("--only", default="", help="what names of schedules begin with, separated by ;")
    parser.add_argument("--record", type=Path, default=Path(), help="a file of what was timed, to go on from")
    launch(RANKS, worker, parser.parse_args())
