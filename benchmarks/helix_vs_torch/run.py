"""HelixPipe against 1F1B, ours and torch's, and the perfect two-way split. `python benchmarks/helix_vs_torch/run.py`"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import PlainParts, interleaved, launch, machine, mean_loss, ratio, split_step
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import helixpipe.schedule.families as families
from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.pipeline import Pipeline

RANKS = 2
SPLIT = "perfect split"
TORCH = "torch 1F1B"


def contender_steps(
    rank: int, shape: ModelShape, m: int, tokens: torch.Tensor, targets: torch.Tensor
) -> dict[str, Any]:
    """Name -> one step of it on this rank. Same parameters, same data, no recompute anywhere."""
    steps: dict[str, Any] = {}

    def ours(family: str, **options: Any) -> Any:
        schedule = families.build_schedule(family, ranks=RANKS, layers=shape.layers, microbatches=m, **options)
        pipeline = Pipeline(Decoder(shape), schedule, recompute="none")

        def step() -> float:
            pipeline.zero_gradients()
            return pipeline.step(tokens, targets)

        return step

    for travel in ("attention", "qkv", "none"):
        steps[f"helix, {travel} travels"] = ours("helix", folds=2, travel=travel)
    steps["our 1F1B"] = ours("1f1b")

    half = shape.layers // RANKS
    stage_module = PlainParts(shape, range(rank * half, (rank + 1) * half))
    stage = PipelineStage(stage_module, rank, RANKS, torch.device("cpu"))
    theirs = Schedule1F1B(stage, n_microbatches=m, loss_fn=mean_loss)

    def torch_step() -> float:
        stage_module.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            theirs.step(tokens)
        else:
            theirs.step(target=targets, losses=losses)
        return float(torch.stack(losses).mean().detach()) if losses else float("nan")

    steps[TORCH] = torch_step

    whole = PlainParts(shape, range(shape.layers))
    steps[SPLIT] = lambda: split_step(whole, tokens, targets)
    return steps


def worker(rank: int, args: argparse.Namespace) -> None:
    shape = ModelShape(
        layers=args.layers, hidden=args.hidden, heads=args.heads, ffn=4 * args.hidden, vocabulary=256,
        mlp="gelu", norm="layer",
    )  # fmt: skip
    batch = Batch(1, (args.length,))
    share = {p.kind: 0.0 for p in chain(shape.layers)}
    for part in chain(shape.layers):
        share[part.kind] += shape.forward_flops(part, batch, 0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (args.microbatches, args.length), generator=generator)
    targets = torch.randint(256, (args.microbatches, args.length), generator=generator)
    steps = contender_steps(rank, shape, args.microbatches, tokens, targets)
    losses = {name: step() for name, step in steps.items()}  # also the warm-up
    seconds = interleaved(steps, args.rounds, warmup=0)
    if rank:
        return
    print(f"{machine()}; {args.rounds} rounds", file=sys.stderr)
    print({name: round(loss, 4) for name, loss in losses.items()}, file=sys.stderr)
    result: dict[str, Any] = {
        "machine": machine(), "layers": args.layers, "hidden": args.hidden, "heads": args.heads,
        "length": args.length, "microbatches": args.microbatches, "rounds": args.rounds,
        "attention_share_of_forward_flops": share["attn"] / sum(share.values()), "contenders": {},
    }  # fmt: skip
    for name in steps:
        over_split, low, high = ratio(seconds, name, SPLIT)
        faster, *_ = ratio(seconds, TORCH, name)
        result["contenders"][name] = {
            "median_s": statistics.median(seconds[name]), "over_perfect_split": over_split,
            "range": [low, high], "times_as_fast_as_torch_1f1b": faster,
        }  # fmt: skip
    print(json.dumps(result, indent=2) if args.json else table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}. L={result['layers']} h={result['hidden']} s={result['length']} m={result['microbatches']}, "
        f"attention {result['attention_share_of_forward_flops']:.0%} of forward FLOPs, {result['rounds']} rounds",
        "",
        "| schedule | median step, s | over the perfect split | range | times as fast as torch's 1F1B |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["contenders"].items():
        low, high = row["range"]
        lines.append(
            f"| {name} | {row['median_s']:.2f} | {row['over_perfect_split']:.3f} | {low:.3f} to {high:.3f} | "
            f"{row['times_as_fast_as_torch_1f1b']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 4),
        ("hidden", 128),
        ("heads", 2),
        ("length", 4096),
        ("microbatches", 4),
        ("rounds", 9),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    launch(RANKS, worker, parser.parse_args())
