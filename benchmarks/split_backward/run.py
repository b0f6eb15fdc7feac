"""What the split backward costs: I + W over a full B, ours and torch's. `python benchmarks/split_backward/run.py`

One process, one thread, one core; a stage of some layers; only backwards are timed, each after a forward of its own.
torch's split is that of torch.distributed.pipelining, on the same modules with torch's linear layers; its
checkpointing is torch.utils.checkpoint per layer, beside our selective recompute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixpipe.runtime.live import Live

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import PlainParts, machine, ratio
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from helixpipe.model.decoder import Decoder
from helixpipe.model.linear import add_product
from helixpipe.parts.part import Value, layer_parts
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.tape import Feed, Tape
from helixpipe.schedule.stage import Stage


class Checkpointed(PlainParts):
    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return checkpoint(super().layer, x, i, use_reentrant=False)  # type: ignore[no-any-return]


def ours(shape: ModelShape, layers: int, policy: str, x: torch.Tensor, split: bool) -> Callable[[], float]:
    decoder = Decoder(shape)
    parts = tuple(part for layer in range(1, layers + 1) for part in layer_parts(layer))
    modules = {part: decoder.part(part) for part in parts}
    ledger, end = Ledger(lambda pointer: False), Value("x", layers + 1)
    tape = Tape(Stage(parts), modules, policy, ledger, (end,))
    feed = Feed(torch.empty(0), torch.empty(0))
    gradient = torch.randn_like(x)
    weights = [p for module in modules.values() for p in module.parameters()]

    def backward() -> float:
        live = Live(ledger)
        live.put(Value("x", 1), x)
        records = tape.forward(live, feed)
        live.drop((end,))
        gradients = {end: ledger.keep(gradient.clone())}  # a backward may write into what it is given
        begun = time.perf_counter()
        if split:
            for weight, kept_x, kept_grad in tape.input_backward(records, gradients, feed):
                add_product(weight, kept_x.tensor, kept_grad.tensor)
        else:
            tape.backward(records, gradients, feed)
        seconds = time.perf_counter() - begun
        assert all(weight.grad is not None for weight in weights)
        return seconds

    return backward


def torchs(shape: ModelShape, layers: int, kind: type[PlainParts], x: torch.Tensor, split: bool) -> Callable[[], float]:
    module = kind(shape, range(1, layers + 1))
    gradient = torch.randn_like(x)

    def backward() -> float:
        leaf = x.detach().requires_grad_()
        out = module(leaf)
        begun = time.perf_counter()
        if split:
            _, groups = stage_backward_input([out], [gradient], [leaf], module.parameters())
            stage_backward_weight(module.parameters(), groups)
        else:
            out.backward(gradient)
        return time.perf_counter() - begun

    return backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("hidden", 256), ("heads", 4), ("length", 2048), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    shape = ModelShape(
        layers=args.layers + 2, hidden=args.hidden, heads=args.heads, ffn=4 * args.hidden, vocabulary=256,
        mlp="gelu", norm="layer",
    )  # fmt: skip
    x = torch.randn(1, args.length, args.hidden, generator=torch.Generator().manual_seed(0))
    contenders = {
        f"{who} {how} {what}": make(shape, args.layers, kind, x, what == "I+W")  # type: ignore[operator]
        for who, how, make, kind in (
            ("ours", "none", ours, "none"),
            ("ours", "selective", ours, "selective"),
            ("ours", "full", ours, "full"),
            ("torch", "none", torchs, PlainParts),
            ("torch", "checkpoint", torchs, Checkpointed),
        )
        for what in ("B", "I+W")
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, args.rounds):
        for name, backward in contenders.items():
            took = backward()
            if turn >= 0:
                seconds[name].append(took)
    rows: list[dict[str, Any]] = []
    for who in ("ours none", "ours selective", "ours full", "torch none", "torch checkpoint"):
        middle, low, high = ratio(seconds, f"{who} I+W", f"{who} B")
        median_s = statistics.median(seconds[f"{who} B"])
        rows.append({"who": who, "full_backward_s": median_s, "split_over_full": middle, "range": [low, high]})
    if args.json:
        print(json.dumps({"machine": machine(), **vars(args), "rows": rows}, indent=2))
        return
    print(f"{machine()}. {args.layers} layers, h={args.hidden}, s={args.length}, {args.rounds} rounds\n")
    print("| backward | B, s | I+W over B | range |\n| --- | --- | --- | --- |")
    for row in rows:
        low, high = row["range"]
        print(
            f"| {row['who']} | {row['full_backward_s']:.3f} | {row['split_over_full']:.3f} | {low:.3f} to {high:.3f} |"
        )


if __name__ == "__main__":
    main()
