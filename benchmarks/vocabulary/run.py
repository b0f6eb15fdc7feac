"""What does a vocabulary on all ranks bring? `python benchmarks/vocabulary/run.py`

2 ranks, one core and one thread each; a model whose head is 30% of the FLOPs that a rank has in layers. Schedules of ours with head
and embedding on one rank each (`last`) and in shards on all (`spread`), and torch's, which know the first alone: seconds over the
perfect two-way split (each rank half of the micro-batches through the whole model, no messages), timed before and after each group.
`last` and `spread` of one family run one after the other, in turn. Peaks are the most bytes of activations that a step kept.

Which rank has how many layers is the library's choice in both (`Setting.build`): a whole head has fewer layers beside it.
"""

from __future__ import annotations

import argparse
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
    steps: dict[str, Callable[[], float]] = {}
    peaks: dict[str, str] = {}
    names = [name for name in FAMILIES if not args.only or name in args.only.split(";")]
    for name in names:
        for vocabulary in ("last", "spread"):
            pipeline = ours(shape, args, name, vocabulary)

            def step(pipeline: Pipeline = pipeline) -> float:
                pipeline.zero_gradients()
                return pipeline.step(tokens, targets)

            steps[f"{name}, {vocabulary}"] = step
            step()
            kept = pipeline.timeline().peak_activation_bytes
            peaks[f"{name}, {vocabulary}"] = ", ".join(f"{each / 2**20:.0f}" for each in kept)
    for name in TORCH:
        peer = TorchPipeline(shape, args.microbatches, tokens, targets, name)

        def step_of(peer: TorchPipeline = peer) -> float:
            peer.zero_gradients()
            return peer.step()

        steps[name] = step_of
        step_of()
    whole = PlainParts(shape, range(shape.layers))
    losses = {name: everyones(step()) for name, step in steps.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses  # one model, one loss
    seconds, splits = interleaved_beside(lambda: split_step(whole, tokens, targets), steps, groups(names, args.rounds))
    if rank:
        return
    print(
        f"{machine()}. L={shape.layers} h={shape.hidden} s={args.length} m={args.microbatches}, {shape.vocabulary} words, "
        f"head {args.share:.0%} of a rank's layers, {args.rounds} rounds\n"
    )
    print("| schedule | over the perfect split (of medians) | range | spread over last | peak activations, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for name, took in seconds.items():
        middle, low, high = paired(took, splits[name])
        of_medians = statistics.median(took) / statistics.median(splits[name])
        last = seconds.get(name.replace("spread", "last"), took)
        over = f"{paired(took, last)[0]:.3f}" if last is not took else ""
        print(
            f"| {name} | {middle:.3f} ({of_medians:.3f}) | {low:.3f} to {high:.3f} | {over} | {peaks.get(name, '')} |"
        )


def everyones(mine: float) -> float:
    """The loss, which one rank of torch's has and all of ours."""
    found = torch.tensor([mine])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def groups(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Who runs between two timings of the split; the order turns from round to round."""
    for turn in range(rounds):
        each = [[f"{name}, last", f"{name}, spread"][:: 1 if turn % 2 else -1] for name in names]
        each += [[name] for name in TORCH]
        at = turn % len(each)
        yield from each[at:] + each[:at]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (
        ("layers", 4), ("hidden", 128), ("heads", 2), ("length", 4096), ("microbatches", 8), ("rounds", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.3, help="of the head, beside a rank's layers")
    parser.add_argument("--only", default="", help="names of our schedules, separated by ;")
    launch(RANKS, worker, parser.parse_args())
