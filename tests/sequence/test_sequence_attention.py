"""Every method against attention by the book on one process: output and gradients, float64 to 1e-10."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracle_attention import (
    Case,
    attend,
    expected,
    ids_of,
    largest_difference,
    mesh_for,
    plain_attention,
    relative_norm,
    spread,
    worst,
)
from ranks import Ranks
from torch import Tensor

import helixpipe
from helixpipe.errors import ConfigError
from helixpipe.model.attention import KeptAttention
from helixpipe.runtime.ledger import Ledger
from helixpipe.sequence import (
    from_contiguous,
    gather,
    linformer_attention,
    ring_attention,
    shard,
    shard_batch,
    to_contiguous,
)

RING = [
    Case(rings=(ranks,), layout=layout, causal=causal, documents=documents, kv_heads=kv_heads)
    for ranks in (1, 2, 3, 4)
    for layout in ("plain", "zigzag", "striped")
    for causal, documents, kv_heads in (
        (True, "none", 2),
        (False, "none", 4),
        (True, "lengths", 4),
        (True, "ids", 1),
        (False, "ids", 2),
    )
]
OTHERS = [
    replace(case, causal=causal, documents=documents)
    for case in (
        Case("ulysses", (1,), 2, "plain"),
        Case("ulysses", (1,), 4, "plain", kv_heads=2),
        Case("ulysses", (1,), 3, "plain", heads=6, kv_heads=2, length=21),  # neither divides the other
        Case("ulysses", (1,), 4, "plain", kv_heads=1),
        Case("2-D", (2,), 2, "zigzag", kv_heads=2),
        Case("2-D", (2,), 2, "striped", kv_heads=1),
        Case("2-D", (2,), 2, "plain"),
        Case("double ring", (2, 2), 1, "zigzag", kv_heads=2),
        Case("double ring", (2, 2), 1, "striped"),
        Case("double ring", (2, 2), 1, "plain"),
    )
    for causal, documents in ((True, "none"), (False, "lengths"), (True, "ids"))
]
LENGTHS = [
    Case(rings=(4,), layout="zigzag", length=8, batch=1),
    Case(rings=(4,), layout="striped", length=4, batch=1),
    Case(rings=(3,), layout="plain", length=57, batch=1),
    Case(rings=(2,), layout="zigzag", length=132, head_dim=5, batch=1),
]


@pytest.mark.parametrize("case", RING + OTHERS + LENGTHS, ids=str)
def test_equals_one_process(four_ranks: Ranks, case: Case) -> None:
    found = four_ranks.run(spread, case)
    reference = expected(case)
    for each in found[: case.ranks]:
        assert worst(each, reference, largest_difference) < 1e-10


@pytest.fixture(scope="module")
def eight_ranks() -> Iterator[Ranks]:
    ranks = Ranks(8)
    yield ranks
    ranks.close()


EIGHT = [
    Case(rings=(8,), layout="zigzag", length=32, kv_heads=2),
    Case(rings=(8,), layout="striped", length=32, documents="ids"),
    Case("ulysses", (1,), 8, "plain", length=32, heads=8, kv_heads=2),
    Case("2-D", (4,), 2, "zigzag", length=32),
    Case("double ring", (2, 4), 1, "zigzag", length=32, kv_heads=2),
    Case("all of it", (2, 2), 2, "zigzag", length=32, documents="lengths"),
]


def test_eight_ranks(eight_ranks: Ranks) -> None:
    for case in EIGHT:
        reference = expected(case)
        for each in eight_ranks.run(spread, case):
            assert worst(each, reference, largest_difference) < 1e-10, case


# relative error of output and gradients against float64, of the same rounded inputs
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_error_does_not_grow_with_the_ring(eight_ranks: Ranks, dtype: torch.dtype) -> None:
    """One kernel call rounds its output once; merged ones are rounded once more, however many they are."""
    for causal in (True, False):
        errors = {}
        for ranks in (1, 2, 4, 8):
            case = Case(rings=(ranks,), causal=causal, length=256, kv_heads=2, head_dim=32, dtype=dtype)
            found = eight_ranks.run(spread, case)[0]
            errors[ranks] = [relative_norm(a.double(), b) for a, b in zip(found, expected(case), strict=True)]
            assert max(errors[ranks]) < TOLERANCE[dtype], errors
        for one, two, eight in zip(errors[1], errors[2], errors[8], strict=True):
            assert eight < 1.15 * two, errors
            assert eight < 1.4 * one, errors


def replayed(case: Case) -> tuple[list[Tensor], list[Tensor], int] | None:
    """Output and gradients of a first run and of its replay, and the messages posted by the replay's forward."""
    mesh = mesh_for(case.rings, case.heads_over)
    if mesh is None:
        return None
    *local, grad = (shard(t, mesh, case.layout) for t in case.inputs())
    kept, runs = KeptAttention(), []
    posted = 0
    passing = torch.distributed.batch_isend_irecv

    def counted(operations: list[torch.distributed.P2POp]) -> list[torch.distributed.Work]:
        nonlocal posted
        posted += len(operations)
        return passing(operations)

    torch.distributed.batch_isend_irecv = counted
    try:
        for _ in range(2):
            leaves = [t.detach().requires_grad_() for t in local]
            posted = 0
            out = attend(case, mesh, *leaves, kept=kept)
            sent = posted
            runs.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    finally:
        torch.distributed.batch_isend_irecv = passing
    assert kept.lse is not None
    assert kept.lse.shape == (case.batch, case.heads // mesh.heads, case.length // mesh.ring_size)
    return runs[0], runs[1], sent


# of two ranks that divide the heads each sends and receives q, k, v, and then the output
@pytest.mark.parametrize(("case", "messages"), [(Case(rings=(4,)), 0), (Case("2-D", (2,), 2), 4)], ids=str)
def test_replayed_from_what_was_kept(four_ranks: Ranks, case: Case, messages: int) -> None:
    for first, again, sent in four_ranks.run(replayed, case):
        assert sent == messages
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_log_sum_exp_is_of_all_keys() -> None:
    case = Case(rings=(1,), documents="lengths", causal=False)
    q, k, v, _ = case.inputs()
    kept = KeptAttention()
    ring_attention(q, k, v, causal=False, documents=case.packed(), kept=kept)
    scores = torch.einsum("bihd,bjhd->bhij", q[:, 4:13], k[:, 4:13]) * case.head_dim**-0.5
    assert kept.lse is not None
    assert torch.allclose(kept.lse[:, :, 4:13], scores.logsumexp(-1), rtol=0, atol=1e-12)


def linformer(case: Case, p: int) -> list[Tensor] | None:
    mesh = mesh_for(case.rings, case.heads_over)
    if mesh is None:
        return None
    q, k, v, grad = (shard(t, mesh, case.layout) for t in case.inputs())
    projections = [shard(t, mesh, case.layout) for t in projections_of(case, p)]
    leaves = [t.requires_grad_() for t in (q, k, v, *projections)]
    out = linformer_attention(*leaves, mesh, case.layout, case.packed())
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    return [gather(t, mesh, case.layout) for t in found]


def projections_of(case: Case, p: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(p, case.length, generator=generator, dtype=torch.float64) for _ in range(2)]


LINFORMER = [
    Case("linformer", (ranks,), 1, layout, False, documents, kv_heads=2)
    for ranks in (1, 2, 3, 4)
    for layout, documents in (("plain", "none"), ("zigzag", "lengths"), ("plain", "ids"))
]


@pytest.mark.parametrize("case", LINFORMER, ids=str)
def test_linformer_equals_one_process(four_ranks: Ranks, case: Case) -> None:
    p = 3
    q, k, v, grad = case.inputs()
    leaves = [t.requires_grad_() for t in (q, k, v, *projections_of(case, p))]
    q, k, v, project_k, project_v = leaves
    ids = ids_of(case.packed(), case.batch, case.length)
    rows = []
    for row in range(case.batch):
        out_row = torch.zeros_like(q[row])
        for document in ids[row].unique():
            own = (ids[row] == document).nonzero().squeeze(1)
            short = [m[:, own] @ t[row, own].flatten(1) for m, t in ((project_k, k), (project_v, v))]
            small_k, small_v = (t.unflatten(1, (case.kv_heads, -1)).unsqueeze(0) for t in short)
            one = _rectangular(q[row : row + 1, own], small_k, small_v)
            out_row = out_row.index_add(0, own, one[0])
        rows.append(out_row)
    out = torch.stack(rows)
    reference = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for each in four_ranks.run(linformer, case, p)[: case.ranks]:
        assert worst(each, reference, largest_difference) < 1e-10


def _rectangular(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def moved(ranks: int, layout: str) -> tuple[Tensor, ...] | None:
    mesh = mesh_for((ranks,), 1)
    if mesh is None:
        return None
    whole = torch.arange(24.0, dtype=torch.float64).reshape(2, 12, 1)
    contiguous = shard(whole, mesh, "plain").requires_grad_()
    there = from_contiguous(contiguous, mesh, layout)
    assert torch.equal(there, shard(whole, mesh, layout))
    back = to_contiguous(there * 2, mesh, layout)
    assert torch.equal(back, 2 * contiguous)
    all_of_it = gather(there, mesh, layout)
    assert torch.equal(all_of_it, whole)
    # each rank's loss weighs each token by rank + 1: a token's gradient is the sum over ranks
    weights = torch.arange(12.0, dtype=torch.float64).reshape(1, 12, 1)
    (gradient,) = torch.autograd.grad(((mesh.rank + 1) * weights * all_of_it).sum(), contiguous, retain_graph=True)
    assert torch.equal(gradient, (ranks * (ranks + 1) // 2) * shard(weights, mesh, "plain").expand_as(gradient))
    (gradient,) = torch.autograd.grad((back * contiguous.detach()).sum(), contiguous)
    assert torch.equal(gradient, 2 * contiguous)
    return tuple(shard_batch(whole[..., 0].long(), mesh, layout))


@pytest.mark.parametrize("layout", ["plain", "zigzag", "striped"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_tokens_there_and_back(four_ranks: Ranks, ranks: int, layout: str) -> None:
    pairs = set()
    for tokens, targets, positions in four_ranks.run(moved, ranks, layout)[:ranks]:
        for token, target, position in zip(*(t.flatten().tolist() for t in (tokens, targets, positions)), strict=True):
            assert token % 12 == position
            assert target == (token + 1 if position < 11 else -100)
            pairs.add(token)
    assert pairs == set(range(24))


def refused(what: str) -> str | None:
    mesh = mesh_for((1,), 4) if what == "heads" else mesh_for((4,), 1)
    assert mesh is not None
    q = torch.zeros(1, 3, 6, 4)
    try:
        if what == "mesh":
            type(mesh)(mesh.group, rings=3, heads=2)
        attend(Case("ulysses" if what == "heads" else "ring"), mesh, q, q, q)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", "sequence.heads: 6 heads do not divide over 4 ranks; use 1, 2, 3 or 6 ranks for the heads and rings for"),
        ("length", "sequence.length: 12 tokens do not divide over 4 ranks in the zigzag layout, which needs a multiple of 8;"),
        ("mesh", "sequence.mesh: rings of 3 times 2 ranks over heads are not the 4 ranks of the group; rings x heads may be"
         " 4 x 1, 2 x 2, 1 x 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(four_ranks: Ranks, what: str, message: str) -> None:
    for error in four_ranks.run(refused, what):
        assert error is not None
        assert error.startswith(message)


def test_nothing_stays_when_the_graph_goes() -> None:
    """Guards against a cycle of references that once held q, and with it the graph before it, until a collection."""
    q, k, v, _ = Case().inputs()
    ledger = Ledger(lambda pointer: False)
    gc.collect()
    gc.disable()
    try:
        with ledger.graphs():
            out = ring_attention(q.requires_grad_().square(), k, v, documents=(0, 5, 24))
        assert ledger.bytes > 0
        del out
        assert ledger.bytes == 0
    finally:
        gc.enable()


def test_without_ranks_it_is_attention() -> None:
    """No process group: the whole sequence is here."""
    case = Case(kv_heads=2, documents="lengths")
    q, k, v, _ = case.inputs()
    reference = plain_attention(q, k, v, True, case.packed())
    assert largest_difference(helixpipe.ring_attention(q, k, v, documents=case.packed()), reference) < 1e-10
    assert largest_difference(helixpipe.ulysses_attention(q, k, v, documents=case.packed()), reference) < 1e-10
