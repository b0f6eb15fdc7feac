"""One accelerator: long sequences under each recompute policy, chunked or not, beside plain torch.

    python benchmarks/gpu/run.py --model 1.3b --lengths 32768 65536 131072

Plain torch is the same modules in one autograd graph, without and with `torch.utils.checkpoint` per layer. Each
row runs in a process of its own, so that one's memory is not another's. Model FLOPs: 6 per parameter and token,
and causal attention's half of the scores, forward and backward; recomputation does not count as useful work.
`--device cpu` with a tiny model runs the same code where there is no accelerator.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import queue
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import PlainParts, mean_loss
from torch.utils.checkpoint import checkpoint

from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Batch
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

# bf16 matrix peak without sparsity, from the vendors' data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
POLICIES = ("none", "full", "selective")


class Checkpointed(PlainParts):
    """Plain torch with its own activation checkpointing, one layer at a time."""

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return checkpoint(super().layer, x, i, use_reentrant=False)  # type: ignore[no-any-return]


def model_flops(shape: ModelShape, length: int) -> float:
    batch = Batch(1, (length,))
    forward = sum(shape.forward_flops(part, batch, 0) for part in chain(shape.layers))
    return 3 * forward


def measure(row: dict[str, Any], shape: ModelShape, length: int, device: str, steps: int, results: Any) -> None:
    """One row, in a process of its own: seconds a step and peak bytes, or why not."""
    try:
        results.put(row | _measure(row, shape, length, device, steps))
    except torch.OutOfMemoryError:
        results.put(row | {"error": "out of memory"})


def _measure(row: dict[str, Any], shape: ModelShape, length: int, device: str, steps: int) -> dict[str, Any]:
    dtype = torch.bfloat16
    tokens = torch.randint(shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    if row["contender"] == "helixpipe":
        chunk = row["chunk"]
        model = Decoder(shape, mlp_chunk=chunk, head_chunk=chunk)
        schedule = build_schedule("helix", ranks=1, layers=shape.layers, microbatches=1, folds=1, travel="attention")
        pipeline = Pipeline(model, schedule, device=device, dtype=dtype, recompute=row["recompute"])

        def step() -> None:
            pipeline.zero_gradients()
            pipeline.step(tokens, tokens)
    else:
        kind = PlainParts if row["recompute"] == "none" else Checkpointed
        plain = kind(shape, range(shape.layers)).to(device, dtype)
        on = tokens.to(device)

        def step() -> None:
            plain.zero_grad()
            mean_loss(plain(on), on).backward()

    cuda = device.startswith("cuda")
    step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / steps
    found: dict[str, Any] = {"step_s": seconds, "tokens_per_s": length / seconds}
    if cuda:
        name = torch.cuda.get_device_name()
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["model_flops_utilisation"] = model_flops(shape, length) / seconds / peak if peak else None
    if row["contender"] == "helixpipe":
        found["peak_activation_bytes"] = pipeline.timeline().peak_activation_bytes[0]
    return found


def rows(chunk: int) -> list[dict[str, Any]]:
    ours = [{"contender": "helixpipe", "recompute": r, "chunk": c} for r in POLICIES for c in (0, chunk)]
    return ours + [{"contender": "torch", "recompute": r, "chunk": 0} for r in ("none", "full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.3b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the named model, when it does not fit")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    args = parser.parse_args()
    shape = named_shape(args.model)
    shape = replace(shape, layers=args.layers or shape.layers)
    context = mp.get_context("spawn")
    for length in args.lengths:
        for row in rows(args.chunk):
            results = context.Queue()
            todo = (row | {"length": length}, shape, length, args.device, args.steps, results)
            process = context.Process(target=measure, args=todo)
            process.start()
            try:
                print(json.dumps(results.get(timeout=600)), flush=True)
            except queue.Empty:
                print(json.dumps(row | {"length": length, "error": "no answer in 600 s"}), flush=True)
            process.join(10)
            process.kill()


if __name__ == "__main__":
    main()
