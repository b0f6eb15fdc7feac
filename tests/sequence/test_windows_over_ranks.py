"""Windows, capped scores and a scale over ranks: against the mask itself on one process, float64; and what need not be sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracle_attention import Case, attend, expected, largest_difference, mesh_for, spread, worst
from ranks import Ranks

import helixpipe
from helixpipe.errors import ConfigError
from helixpipe.model.tiles import tiles
from helixpipe.sequence import Layout, shard

WAYS = [
    *(Case(rings=(ranks,), layout=layout) for ranks in (1, 2, 3) for layout in ("plain", "zigzag", "striped")),
    Case("ulysses", (1,), 2, "plain"),
    Case("ulysses", (1,), 3, "plain", heads=6, kv_heads=2),
    *(Case("2-D", (2,), 2, layout) for layout in ("plain", "zigzag", "striped")),
    *(Case("double ring", (2, 2), 1, layout) for layout in ("plain", "zigzag")),
]
# 12 and 8 are blocks of two and three ranks, 24 the sequence
WINDOWS = (1, 2, 5, 8, 11, 12, 13, 24, 30)


def cases() -> Iterator[Case]:
    """Every way and window; the rest in turn."""
    for i, (way, window) in enumerate(itertools.product(WAYS, WINDOWS)):
        yield replace(
            way, window=window, causal=i % 3 > 0, kv_heads=way.kv_heads if way.heads == 6 else (4, 2, 1)[(i + i // 3) % 3],
            documents=("none", "lengths", "none", "ids")[i % 4], softcap=(0.0, 0.0, 1.5)[i // 2 % 3],
            scale=(0.0, 0.6)[i // 5 % 2], batch=1 + i % 2,
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_equals_one_process(four_ranks: Ranks, way: Case) -> None:
    for case in cases():
        if (case.method, case.rings, case.heads_over, case.layout) != (
            way.method,
            way.rings,
            way.heads_over,
            way.layout,
        ):
            continue
        out, *gradients = expected(case)
        for each in four_ranks.run(spread, case)[: case.ranks]:
            assert largest_difference(each[0], out) < 1e-12, case
            assert worst(each[1:], gradients, largest_difference) < 1e-10, case


def hops(case: Case) -> tuple[int, int] | None:
    """Messages that this rank posts in a forward, and in a backward."""
    mesh = mesh_for(case.rings, case.heads_over)
    if mesh is None:
        return None
    q, k, v, grad = (shard(t, mesh, case.layout) for t in case.inputs())
    posted = 0
    passing = torch.distributed.batch_isend_irecv

    def counted(operations: list[torch.distributed.P2POp]) -> list[torch.distributed.Work]:
        nonlocal posted
        posted += sum(operation.op is torch.distributed.isend for operation in operations)
        return passing(operations)

    torch.distributed.batch_isend_irecv = counted
    try:
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = attend(case, mesh, *leaves)
        forward = posted
        torch.autograd.grad(out, leaves, grad)
    finally:
        torch.distributed.batch_isend_irecv = passing
    return forward, posted - forward


@pytest.mark.parametrize(
    ("window", "reached"), [(0, 3), (1, 0), (2, 1), (6, 1), (7, 1), (8, 2), (13, 2), (14, 3), (24, 3)]
)
def test_a_causal_window_over_plain_shards_sends_no_further_than_it_reaches(
    four_ranks: Ranks, window: int, reached: int
) -> None:
    """6 tokens a rank. Keys and values are two messages a hop; their gradients travel as many hops, the last one home."""
    case = Case(rings=(4,), layout="plain", window=window)
    assert four_ranks.run(hops, case) == [(2 * reached, 4 * reached)] * 4


@pytest.mark.parametrize("kind", ["plain", "zigzag"])
def test_what_comes_around_and_is_not_seen_is_not_computed(kind: str) -> None:
    """Of 1024 tokens on four ranks, a window of 16: tiles hold little more than what is seen."""
    layout = Layout(kind, 1024, 4)
    for rank in range(4):
        found = [tile for source in range(4) for tile in tiles(layout.runs(rank), layout.runs(source), True, window=16)]
        held = sum((tile.q_stop - tile.q_start) * (tile.k_stop - tile.k_start) for tile in found)
        assert held < 2 * 256 * 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": -1}, "attention window: -1; give how many tokens see each other, 0 is all"),
        ({"window": 2.5}, "attention window: 2.5; give how many tokens see each other, 0 is all"),
        ({"softcap": -1.0}, "attention softcap: -1.0; give a number from 0 up, 0 is none"),
        ({"softcap": float("nan")}, "attention softcap: nan; give a number from 0 up, 0 is none"),
        ({"scale": -0.5}, "attention scale: -0.5; give a number from 0 up, 0 is head_dim ** -0.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(given: dict[str, float], message: str) -> None:
    q = torch.zeros(1, 4, 2, 8)
    for run in (
        lambda: helixpipe.ring_attention(q, q, q, **given),
        lambda: helixpipe.ulysses_attention(q, q, q, **given),
        lambda: helixpipe.Attention(True, **given),
    ):
        with pytest.raises(ConfigError) as raised:
            run()
        assert str(raised.value) == message
