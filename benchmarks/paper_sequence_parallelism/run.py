"""Sequence parallelism as published (arXiv 2105.13120): its memory model beside its numbers, and what we measure.

    python benchmarks/paper_sequence_parallelism/run.py               # a minute on two cores
    python benchmarks/paper_sequence_parallelism/run.py --predicted   # the formulas alone

Measured: the largest batch and the longest sequence whose forward keeps at most a budget of activations for its
backward on any of 4 local ranks, counted by storage as autograd saves them. All methods run the same layers with the
same weights, which is checked first; attention is fused everywhere, so nobody keeps scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import launch, machine
from torch import Tensor

from helixpipe.model.attn import Attention
from helixpipe.predict.sequence_memory import (
    BERT_BASE,
    BERT_LARGE,
    Encoder,
    Method,
    batch_ratio,
    length_ratio,
    linformer,
    longest,
    ring_self_attention,
    tensor_parallel,
)
from helixpipe.runtime.ledger import Ledger
from helixpipe.sequence import linformer_attention, ring_attention, shard, ulysses_attention

RANKS = 4
P100_BYTES = 16e9
# ranks, batch, length, published MB on a rank: tensor parallel (None: out of memory), sequence parallel
TABLE_4 = (
    (1, 64, 512, 8477, 8478), (2, 128, 512, 9520, 8479), (4, 256, 512, 12233, 8481), (8, 512, 512, None, 8491),
    (1, 64, 256, 3707, 3707), (2, 64, 512, 4993, 4671), (4, 64, 1024, 8176, 6602), (8, 64, 2048, 14862, 10536),
)  # fmt: skip


def predicted() -> dict[str, Any]:
    """The formulas beside what was published."""
    batches = [
        {"claim": "batch, BERT-Base, L=512, 64 ranks against 12", "published": 13.7,
         "formula": batch_ratio(BERT_BASE, 512, 64, 12)},
        {"claim": "batch, BERT-Large, L=512, 64 ranks against 16", "published": 10.2,
         "formula": batch_ratio(BERT_LARGE, 512, 64, 16)},
        {"claim": "batch, BERT-Large, L=512, 16 ranks against 16", "published": 2.7,
         "formula": batch_ratio(BERT_LARGE, 512, 16, 16)},
    ]  # fmt: skip
    lengths = []
    for element_bytes in (2, 4, 8):
        budget = P100_BYTES / BERT_BASE.layers / element_bytes
        lengths.append(
            {
                "element_bytes": element_bytes,
                "64 ranks against 12": length_ratio(BERT_BASE, 64, 64, 12, budget),
                "16 ranks against 12": length_ratio(BERT_BASE, 64, 16, 12, budget),
                "Linformer, 32 ranks, batch 4, K=256, tokens": longest(linformer(256), BERT_BASE, 4, 32, budget),
            }
        )
    return {"batch": batches, "length": lengths, "table_4": table_4()}


def table_4() -> list[dict[str, Any]]:
    """A line through the two rows of one rank: megabytes an element takes, and what is not in the model."""
    long, short = (ring_self_attention(BERT_BASE, 64, length, 1).total for length in (512, 256))
    slope = (8477 - 3707) / (long - short)

    def megabytes(method: Method, batch: int, length: int, ranks: int) -> float:
        return 8477 + slope * (method(BERT_BASE, batch, length, ranks).total - long)

    return [
        {"ranks": n, "batch": b, "length": s, "tensor": tensor, "tensor_predicted": megabytes(tensor_parallel, b, s, n),
         "sequence": ring, "sequence_predicted": megabytes(ring_self_attention, b, s, n)}
        for n, b, s, tensor, ring in TABLE_4
    ]  # fmt: skip


class _Copy(torch.autograd.Function):
    """Megatron's f: the same everywhere forward, summed backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _Reduce(torch.autograd.Function):
    """Megatron's g: summed forward, the same everywhere backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Stack:
    """Encoder layers with layer norms without parameters and no biases."""

    def __init__(self, encoder: Encoder, method: str, dtype: torch.dtype, projection: int) -> None:
        self.encoder, self.method, self.projection = encoder, method, projection
        h = encoder.hidden
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int, split: int) -> Tensor:
            """Whole; of tensor parallelism this rank's rows or columns."""
            whole = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype) * columns**-0.5
            mine = whole.chunk(RANKS, split)[dist.get_rank()].clone() if method == "tensor parallel" else whole
            return mine.requires_grad_()

        self.layers = [
            [
                weight(h, h, 0),
                weight(h, h, 0),
                weight(h, h, 0),
                weight(h, h, 1),
                weight(4 * h, h, 0),
                weight(h, 4 * h, 1),
            ]
            for _ in range(encoder.layers)
        ]
        self.attention = Attention(causal=False)
        pointers = {w.untyped_storage().data_ptr() for layer in self.layers for w in layer}
        self.ledger = Ledger(pointers.__contains__)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.method == "tensor parallel":
            return self.attention(q, k, v)  # type: ignore[no-any-return]
        if self.method == "ring self-attention":
            return ring_attention(q, k, v, None, causal=False, layout="plain").flatten(2)
        if self.method == "Ulysses":
            return ulysses_attention(q, k, v, None, causal=False).flatten(2)
        # learned, so that keys and values are kept for their gradient
        columns = torch.full((self.projection, q.shape[1]), q.shape[1] ** -0.5, dtype=q.dtype, requires_grad=True)
        return linformer_attention(q, k, v, columns, columns, None).flatten(2)

    def __call__(self, x: Tensor) -> Tensor:
        into, out_of = (_Copy.apply, _Reduce.apply) if self.method == "tensor parallel" else (_same, _same)
        for q, k, v, o, up, down in self.layers:
            n = into(F.layer_norm(x, x.shape[-1:]))
            heads = [F.linear(n, w).unflatten(2, (-1, self.encoder.head_dim)) for w in (q, k, v)]
            y = x + out_of(F.linear(self.attend(*heads), o))
            n = into(F.layer_norm(y, y.shape[-1:]))
            x = y + out_of(F.linear(F.gelu(F.linear(n, up)), down))
        return x

    def input(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        whole = torch.randn(batch, length, self.encoder.hidden, generator=torch.Generator().manual_seed(1), dtype=dtype)
        return whole if self.method == "tensor parallel" else shard(whole, None, "plain")

    def kept_bytes(self, batch: int, length: int) -> int:
        """Most on a rank of what one forward keeps for its backward."""
        x = self.input(batch, length, torch.float32).requires_grad_()
        with self.ledger.graphs():
            out = self(x)
        kept = torch.tensor([self.ledger.bytes])
        del out
        dist.all_reduce(kept, op=dist.ReduceOp.MAX)
        return int(kept)


def _same(x: Tensor) -> Tensor:
    return x


def check(encoder: Encoder) -> None:
    """Tensor parallel, ring and Ulysses are the same function, with the same gradient."""
    found = []
    for method in ("tensor parallel", "ring self-attention", "Ulysses"):
        stack = Stack(encoder, method, torch.float64, 0)
        x = stack.input(2, 16, torch.float64).requires_grad_()
        out = stack(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        both = [t if method != "tensor parallel" else shard(t, None, "plain") for t in (out.detach(), gradient)]
        found.append(both)
    for one, other in ((found[0], found[1]), (found[0], found[2])):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(one, other, strict=True))


def largest(kept_bytes: Callable[[int], int], step: int, budget_bytes: int) -> int:
    """The most multiples of `step` whose forward keeps no more than the budget."""
    low, high = 0, 1
    while kept_bytes(high * step) <= budget_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept_bytes(middle * step) <= budget_bytes else (low, middle)
    return low * step


def worker(rank: int, args: argparse.Namespace) -> None:
    encoder = Encoder(args.layers, args.hidden, args.hidden // 16, 16)
    check(encoder)
    rows: list[dict[str, Any]] = []
    budget = int(args.budget_mib * 2**20)
    for method in ("tensor parallel", "ring self-attention", "Ulysses", "Linformer"):
        stack = Stack(encoder, method, torch.float32, args.projection)
        batch = largest(lambda b, s=stack: s.kept_bytes(b, args.length), 1, budget)  # type: ignore[misc]
        length = largest(lambda n, s=stack: s.kept_bytes(args.batch, n), RANKS, budget)  # type: ignore[misc]
        rows.append({"method": method, "batch": batch, "length": length})
    if rank:
        return
    unit = args.hidden * args.length
    scores = encoder.heads * args.length**2 / RANKS  # fused attention does not keep them
    formula = [
        (m(encoder, 1, args.length, RANKS).activations - scores) / unit for m in (tensor_parallel, ring_self_attention)
    ]
    report(args, predicted(), rows, formula[0] / formula[1])


def report(args: argparse.Namespace, theory: dict[str, Any], rows: list[dict[str, Any]], ratio: float | None) -> None:
    if args.json:
        measured = {"machine": machine(), **vars(args), "rows": rows, "formula_without_scores": ratio} if rows else None
        print(json.dumps({"predicted": theory, "measured": measured}, indent=2))
        return
    print("| claim | published | formula |\n| --- | --- | --- |")
    for row in theory["batch"]:
        print(f"| {row['claim']} | {row['published']} | {row['formula']:.2f} |")
    print(
        "\n| bytes an element | length, 64 ranks against 12 (3.0) | 16 against 12 (1.4) | Linformer's tokens (114K) |"
    )
    print("| --- | --- | --- | --- |")
    for row in theory["length"]:
        size, far, near, tokens = row.values()
        print(f"| {size} | {far:.2f} | {near:.2f} | {tokens // 1000}K |")
    print("\n| ranks | batch | length | tensor, MB | predicted | sequence, MB | predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in theory["table_4"]:
        print(
            f"| {row['ranks']} | {row['batch']} | {row['length']} | {row['tensor'] or 'out of memory'} | "
            f"{row['tensor_predicted']:.0f} | {row['sequence']} | {row['sequence_predicted']:.0f} |"
        )
    if not rows:
        return
    print(f"\n{machine()}. {RANKS} ranks, {args.layers} layers, H={args.hidden}, {args.budget_mib:g} MiB a rank\n")
    print(f"| method | largest batch, L={args.length} | times | longest, batch {args.batch} | times |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        times = [row[what] / rows[0][what] for what in ("batch", "length")]
        print(f"| {row['method']} | {row['batch']} | {times[0]:.2f} | {row['length']} | {times[1]:.2f} |")
    print(f"\nThe formulas without scores: {ratio:.2f} times, ring over tensor parallel.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("layers", 2), ("hidden", 128), ("length", 128), ("batch", 4), ("projection", 32))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget-mib", type=float, default=16)
    parser.add_argument("--predicted", action="store_true", help="only the formulas")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.predicted:
        report(args, predicted(), [], None)
    else:
        launch(RANKS, worker, args)


if __name__ == "__main__":
    main()
