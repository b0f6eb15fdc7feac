"""Joint calls, with a kernel of variable lengths put together from the CPU's: what tiles of their own give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from test_packed import LENGTHS, ROWS, leaves
from torch import Tensor

from helixpipe.model import merging
from helixpipe.model.attention import AttentionState, KeyValues, Rule, attend
from helixpipe.model.joint import Joint, joint
from helixpipe.model.kernels import attention_backward, attention_forward, fused_jointly, joint_backward, joint_forward
from helixpipe.model.packed import Packed, packed_tiles
from helixpipe.model.tiles import Run
from helixpipe.parts.work import Batch

CPU = torch.device("cpu")


def ranges(call: Joint) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys of each tile."""
    pairs = itertools.pairwise(call.query_ends.tolist()), itertools.pairwise(call.key_ends.tolist())
    for queries, keys in zip(*pairs, strict=True):
        assert queries[1] - queries[0] <= call.most_queries
        assert keys[1] - keys[0] <= call.most_keys
        yield slice(*queries), slice(*keys)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Joint, scale: float) -> tuple[Tensor, Tensor]:
    """[n, heads, d], as `joint_forward`."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for mine, theirs in ranges(call):
        one, its = attention_forward(
            *(t.transpose(0, 1).unsqueeze(0) for t in (q[mine], k[theirs], v[theirs])), call.causal, 0.0, scale
        )
        out[mine], lse[mine] = one[0].transpose(0, 1), its[0].T
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Joint, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = tuple(map(torch.zeros_like, (q, k, v)))
    for mine, theirs in ranges(call):
        rows = grad[mine], q[mine], k[theirs], v[theirs], out[mine], lse[mine]
        gradients = attention_backward(*(t.transpose(0, 1).unsqueeze(0) for t in rows), call.causal, 0.0, scale)
        for total, gradient, index in zip(found, gradients, (mine, theirs, theirs), strict=True):
            total[index] = gradient[0].transpose(0, 1)
    return found


@pytest.fixture
def jointly(monkeypatch: pytest.MonkeyPatch) -> list[Joint]:
    """Every call of the kernel, made here."""
    calls: list[Joint] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, call: Joint, scale: float) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return forward(q, k, v, call, scale)

    monkeypatch.setattr(merging, "fused_jointly", lambda q, softcap: not softcap)
    monkeypatch.setattr(merging, "joint_forward", noted)
    monkeypatch.setattr(merging, "joint_backward", backward)
    return calls


def run(rule: Rule, segments: tuple[int, ...]) -> list[Tensor]:
    """Output and gradients of sequences in segments, which are what one call a tile gives."""
    given = leaves(4, 12)
    batch = Batch(4, segments, ROWS)
    past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor), batch=batch) if len(segments) > 1 else None
    pieces = [
        [t.detach().requires_grad_() for t in each] for each in zip(*(t.split(segments, 1) for t in given), strict=True)
    ]
    made = [attend(*piece, rule, AttentionState(None, past, i, batch=batch)) for i, piece in enumerate(pieces)]
    gradient = torch.randn(4, 12, made[0].shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = gradient.split(segments, 1)
    found = [torch.autograd.grad(made[i], pieces[i], gradients[i]) for i in reversed(range(len(segments)))][::-1]
    return [torch.cat(made, 1), *(torch.cat(each, 1) for each in zip(*found, strict=True))]


RULES = (Rule(), Rule(window=3), Rule(window=1)), (Rule(causal=False), Rule(causal=False, window=4, scale=0.3))


@pytest.mark.parametrize(("rule", "segments"), [
    *itertools.product(RULES[0], ((12,), LENGTHS)), *itertools.product(RULES[1], ((12,),)),
], ids=str)  # fmt: skip
def test_joint_calls_give_what_tiles_give(
    rule: Rule, segments: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    wanted = run(rule, segments)
    calls = request.getfixturevalue("jointly")
    found = run(rule, segments)
    assert calls
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=0)


def test_documents_of_whole_rows_are_one_call(jointly: list[Joint]) -> None:
    run(Rule(), (12,))
    assert len(jointly) == 1
    assert torch.equal(jointly[0].query_ends, jointly[0].key_ends)
    assert len(jointly[0].query_ends) == 1 + sum(map(len, ROWS))


def test_a_cap_has_no_joint_kernel(jointly: list[Joint]) -> None:
    run(Rule(softcap=3.0), (12,))
    assert not jointly
    assert not fused_jointly(torch.zeros(1, dtype=torch.bfloat16), 0.0)  # of a CPU


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_every_tile_is_in_one_call_and_no_row_is_in_one_twice(causal: bool, window: int) -> None:
    shares = packed_tiles(Packed(ROWS, 0), Run(0, 1, 12), Run(0, 1, 12), causal, window)
    seen = torch.zeros(len(ROWS), 12, 12, dtype=torch.int64)
    for call in joint(shares, len(ROWS), CPU):
        for batch, _, token in (call.queries, call.keys):
            rows = list(zip(batch.tolist(), token.tolist(), strict=True))
            assert len(set(rows)) == len(rows)
        for mine, theirs in ranges(call):
            square = torch.ones(mine.stop - mine.start, theirs.stop - theirs.start, dtype=torch.int64)
            square = square.tril() if call.causal else square
            (row,) = set(call.queries[0][mine].tolist())
            seen[row, call.queries[2][mine].unsqueeze(1), call.keys[2][theirs]] += square
    wanted = torch.zeros_like(seen)
    for batch, tile in shares:
        square = torch.ones(tile.q_stop - tile.q_start, tile.k_stop - tile.k_start, dtype=torch.int64)
        if tile.causal:
            square = square.triu() if tile.flipped else square.tril()
        wanted[batch, tile.queries, tile.keys] += square
    assert torch.equal(seen, wanted)


def test_torch_knows_these_arguments() -> None:
    """The shapes that its kernel of variable lengths gives, without a device."""
    device = torch.device("meta")
    q, k = (torch.empty(12, heads, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2))
    ends = torch.empty(4, dtype=torch.int32, device=device)
    rows = torch.empty(0), slice(None), torch.empty(0)
    call = Joint(rows, rows, ends, ends, 5, 5, True)
    out, lse = joint_forward(q, k, k, call, 0.1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (12, 4), torch.float32)
    assert [each.shape for each in joint_backward(q, q, k, k, out, lse, call, 0.1)] == [q.shape, k.shape, k.shape]
