"""Elements that each rank really hands to the backend, against the formulas. Whole sequence s, N ranks, d a head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import lcm

import pytest
import torch
import torch.distributed as dist
from oracle_attention import Case, attend, mesh_for
from ranks import Ranks

from helixpipe.sequence import linformer_attention, shard


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Elements sent point to point, and summed over ranks, meanwhile; and bytes sent."""
    found = {"sent": 0, "bytes": 0, "summed": 0}
    post, reduce = dist.batch_isend_irecv, dist.all_reduce

    def posting(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.isend:
                found["sent"] += operation.tensor.numel()
                found["bytes"] += operation.tensor.nbytes
        return post(operations)

    def reducing(tensor: torch.Tensor, **more: object) -> object:
        found["summed"] += tensor.numel()
        return reduce(tensor, **more)

    dist.batch_isend_irecv, dist.all_reduce = posting, reducing
    try:
        yield found
    finally:
        dist.batch_isend_irecv, dist.all_reduce = post, reduce


def volumes(case: Case) -> list[dict[str, int]] | None:
    """Of the forward and of the backward."""
    mesh = mesh_for(case.rings, case.heads_over)
    if mesh is None:
        return None
    *local, grad = (shard(t.to(case.dtype), mesh, case.layout) for t in case.inputs())
    leaves = [t.requires_grad_() for t in local]
    with counted() as forward:
        if case.method == "linformer":
            projections = [torch.ones(3, case.length // case.ranks, dtype=case.dtype) for _ in range(2)]
            out = linformer_attention(*leaves, *projections, mesh, case.layout)
        else:
            out = attend(case, mesh, *leaves)
    with counted() as backward:
        out.backward(grad)
    return [forward, backward]


def kv(case: Case, kv_heads: int) -> Fraction:
    """K and V of one head group, the whole sequence's."""
    return Fraction(2 * case.batch * case.length * kv_heads * case.head_dim)


RINGS = [
    Case(rings=rings, layout=layout, kv_heads=kv_heads)
    for rings in ((1,), (2,), (3,), (4,), (2, 2))
    for layout, kv_heads in (("plain", 4), ("zigzag", 2), ("striped", 1))
]


@pytest.mark.parametrize("case", RINGS, ids=str)
def test_ring(four_ranks: Ranks, case: Case) -> None:
    """2 b s h_kv (N-1)/N, and twice that in the backward: K,V once more, and dK,dV. A double ring's is the same."""
    n = case.ranks
    expected = kv(case, case.kv_heads) * (n - 1) / n
    for forward, backward in four_ranks.run(volumes, case)[:n]:
        assert forward["sent"] == expected
        assert backward["sent"] == 2 * expected
        assert forward["summed"] == backward["summed"] == 0


def test_gradients_travel_in_float32(four_ranks: Ranks) -> None:
    case = Case(rings=(4,), dtype=torch.bfloat16)
    expected = kv(case, case.kv_heads) * 3 / 4
    for forward, backward in four_ranks.run(volumes, case):
        assert forward["bytes"] == 2 * expected
        assert backward["bytes"] == (2 + 4) * expected


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ulysses(four_ranks: Ranks, ranks: int, kv_heads: int) -> None:
    """4 b s h (N-1)/N² with as many K,V heads as heads: q, k, v there and o back; K,V repeated where they are fewer."""
    case = Case("ulysses", (1,), ranks, "plain", kv_heads=kv_heads)
    sent_heads = 2 * case.heads + 2 * lcm(kv_heads, ranks)
    expected = Fraction(case.batch * case.length * case.head_dim * sent_heads * (ranks - 1), ranks**2)
    if kv_heads == case.heads:
        assert expected == 2 * kv(case, case.heads) * (ranks - 1) / ranks**2
    for forward, backward in four_ranks.run(volumes, case)[:ranks]:
        assert forward["sent"] == backward["sent"] == expected


def test_product(four_ranks: Ranks) -> None:
    """Ulysses over its own ranks on a ring place's tokens, then the ring with its share of the heads."""
    case = Case("2-D", (2,), 2, kv_heads=2)
    exchanged = Fraction(case.batch * case.length * case.head_dim * (2 * case.heads + 2 * case.kv_heads), 2 * 2**2)
    passed = kv(case, case.kv_heads // 2) / 2
    for forward, backward in four_ranks.run(volumes, case):
        assert forward["sent"] == exchanged + passed
        assert backward["sent"] == exchanged + 2 * passed


def test_linformer(four_ranks: Ranks) -> None:
    """Only the projected K,V are summed, however long the sequence."""
    for length in (24, 48):
        case = Case("linformer", (4,), 1, "plain", False, length=length)
        expected = 2 * case.batch * 3 * case.kv_heads * case.head_dim
        for forward, backward in four_ranks.run(volumes, case):
            assert forward["summed"] == backward["summed"] == expected
            assert forward["sent"] == backward["sent"] == 0
