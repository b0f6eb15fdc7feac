"""Ring and Ulysses attention, forward and backward, over the perfect split. `python benchmarks/ring_attention/run.py`

The perfect split is each rank attending to the whole sequence with half of the heads, with no messages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from peers import interleaved, launch, machine, ratio
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as template

from helixpipe.sequence import ring_attention, shard, ulysses_attention

RANKS = 2
SPLIT = "perfect split"
TORCH = "torch's ring template, zigzag"
aten = torch.ops.aten


def contenders(args: argparse.Namespace, rank: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Name -> one forward and backward on this rank, giving (out, dq, dk, dv) of its tokens or heads."""
    generator = torch.Generator().manual_seed(0)
    many = (args.heads, args.kv_heads or args.heads, args.kv_heads or args.heads, args.heads)
    whole = [torch.randn(1, args.length, heads, args.head_dim, generator=generator) for heads in many]
    group = dist.group.WORLD

    def ours(attend: Callable[..., Tensor], layout: str, *more: Any) -> Callable[[], list[Tensor]]:
        *local, grad = (shard(t, group, layout) for t in whole)

        def step() -> list[Tensor]:
            leaves = [t.requires_grad_() for t in local]
            out = attend(*leaves, group, True, *more)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        return step

    def split() -> list[Tensor]:
        leaves = [t.requires_grad_() for t in mine]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, mine_grad)]

    # contiguous, heads first: as the kernel likes it best
    *mine, mine_grad = (t.chunk(RANKS, 2)[rank].transpose(1, 2).contiguous() for t in whole)
    # the template knows no grouped heads
    repeated = [t.repeat_interleave(args.heads // t.shape[2], 2) for t in whole]
    q, k, v, grad = (shard(t, group, "zigzag").transpose(1, 2).contiguous() for t in repeated)

    def torchs() -> list[Tensor]:
        forward, backward = aten._scaled_dot_product_flash_attention_for_cpu, "grad_out"
        out, lse = template._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        gradients = template._templated_ring_attention_backward(
            group, 2, op, grad, backward, q, k, v, out, lse, is_causal=True, dropout_p=0.0
        )
        return [t.transpose(1, 2) for t in (out, *gradients[:3])]

    found = {f"ring, {layout}": ours(ring_attention, layout, layout) for layout in ("zigzag", "striped", "plain")}
    return found | {"Ulysses": ours(ulysses_attention, "plain"), TORCH: torchs, SPLIT: split}


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most that one step had allocated at one time beyond what was there before it, by torch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del found
    return peak


def worker(rank: int, args: argparse.Namespace) -> None:
    steps = contenders(args, rank)
    mine, theirs = steps["ring, zigzag"](), steps[TORCH]()
    if not args.kv_heads:
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(mine, theirs, strict=True))
    del mine, theirs
    peaks = {}
    for name, step in steps.items():
        step()
        dist.barrier()
        here = torch.tensor([peak_bytes(step)])
        dist.all_reduce(here, op=dist.ReduceOp.MAX)
        peaks[name] = int(here)
    processor: dict[str, list[float]] = {name: [] for name in steps}

    def timed(name: str) -> None:
        begun = time.process_time()
        steps[name]()
        processor[name].append(time.process_time() - begun)

    seconds = interleaved({name: partial(timed, name) for name in steps}, args.rounds, warmup=0)
    both = torch.tensor([processor[name] for name in steps], dtype=torch.float64)
    dist.all_reduce(both)
    if rank:
        return
    processor = dict(zip(steps, both.tolist(), strict=True))
    rows = []
    for name in steps:
        middle, low, high = ratio(seconds, name, SPLIT)
        median_s = statistics.median(seconds[name])
        work = ratio(processor, name, SPLIT)[0]
        rows.append(
            {
                "method": name, "median_s": median_s, "over_split": middle, "range": [low, high],
                "processor_over_split": work, "peak_bytes": peaks[name],
            }
        )  # fmt: skip
    if args.json:
        print(json.dumps({"machine": machine(), **vars(args), "rows": rows}, indent=2))
        return
    print(f"{machine()}. s={args.length}, {args.heads} heads, {args.kv_heads or args.heads} K,V heads of ", end="")
    print(f"{args.head_dim}, causal, float32, {args.rounds} rounds\n")
    print("| method | median, s | over the perfect split | range | processor time over its | peak, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["range"]
        print(
            f"| {row['method']} | {row['median_s']:.3f} | {row['over_split']:.3f} | {low:.3f} to {high:.3f} | "
            f"{row['processor_over_split']:.3f} | {row['peak_bytes'] / 2**20:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 4096), ("heads", 8), ("kv-heads", 0), ("head-dim", 64), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    launch(RANKS, worker, parser.parse_args())


if __name__ == "__main__":
    main()
