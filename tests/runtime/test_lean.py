"""What a recomputed graph does without: the same bits as a kept graph's, fewer bytes, and nothing of it where others read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import batch, plain_step
from torch import Tensor, nn

from helixpipe.model import merging
from helixpipe.model.attention import AttentionState, Rule, attend
from helixpipe.model.decoder import Decoder
from helixpipe.model.qkv import QKV
from helixpipe.parts import attn
from helixpipe.parts.attn import heads_at_once
from helixpipe.parts.part import Part, Value
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.stage import Stage

BASE: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 4, "ffn": 24, "vocabulary": 19}
SHAPES = [
    {},
    {"kv_heads": 2, "norm": "layer", "qkv_bias": True},
    {"qk_norm": True, "positions": "learned", "context": 16},
    {"qk_norm": True, "causal": False, "norm": "layer"},
    {"norms": "after", "qk_norm": True, "qk_norm_over": "width"},
]
MICROBATCHES, LENGTH = 2, 12


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Heads one by one, on one thread, however few the tokens."""
    monkeypatch.setattr(attn, "TOKENS_OF_A_CALL", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(shape: ModelShape, recompute: str, model: Decoder | None = None, family: str = "1f1b") -> dict[str, Tensor]:
    """Gradients of one step."""
    schedule = build_schedule(family, ranks=1, layers=shape.layers, microbatches=MICROBATCHES)
    pipeline = Pipeline(model or Decoder(shape), schedule, dtype=torch.float64, recompute=recompute)
    pipeline.step(*batch(shape, MICROBATCHES, LENGTH))
    assert pipeline._ledger.bytes == 0
    pipeline.close()
    return {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often attention's backward runs, by the number of query heads at a time."""
    counts: Counter[int] = Counter()
    kernel = merging.attention_backward

    def counted(grad: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        counts[grad.shape[1]] += 1
        return kernel(grad, *given)

    monkeypatch.setattr(merging, "attention_backward", counted)
    return counts


@pytest.mark.parametrize("family", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("more", SHAPES, ids=str)
def test_the_same_bits_as_of_a_kept_graph(
    calls: Counter[int], more: dict[str, Any], recompute: str, family: str
) -> None:
    shape = ModelShape(**(BASE | more))
    kept = step(shape, "none", family=family)
    assert calls == {4: shape.layers * MICROBATCHES}
    calls.clear()
    lean = step(shape, recompute, family=family)
    assert calls == {4 // shape.kv_heads: shape.layers * MICROBATCHES * shape.kv_heads}
    assert {name for name in kept if not torch.equal(kept[name], lean[name])} == set()
    _, expected = plain_step(shape, *batch(shape, MICROBATCHES, LENGTH))
    for name, gradient in expected.items():
        torch.testing.assert_close(lean[name], gradient, rtol=1e-9, atol=1e-12)


class Squashed(nn.Module):
    """Someone's own layer, which keeps what it makes for its backward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, n: Tensor) -> Tensor:
        return (n @ self.weight.mT).tanh()


class Doubled(Squashed):
    """Someone's own layer, which changes what it reads before it keeps it."""

    def forward(self, n: Tensor) -> Tensor:
        return n.mul_(2) @ self.weight.mT


@pytest.mark.parametrize("layer", [Squashed, Doubled])
def test_someone_s_own_layer_keeps_what_it_likes(calls: Counter[int], layer: type[Squashed]) -> None:
    class Theirs(Decoder):
        def part(self, part: Part) -> nn.Module:
            made = super().part(part)
            if isinstance(made, QKV):
                made.v = layer(made.v)  # type: ignore[assignment]
            return made

    shape = ModelShape(**BASE)
    kept, lean = (step(shape, recompute, Theirs(shape)) for recompute in ("none", "full"))
    assert calls == {4: 2 * shape.layers * MICROBATCHES}
    assert {name for name in kept if not torch.equal(kept[name], lean[name])} == set()


def test_n_is_made_again_once_for_all_that_read_it() -> None:
    ran: list[Part] = []

    class Watched(Decoder):
        def part(self, part: Part) -> nn.Module:
            made = super().part(part)
            made.register_forward_hook(lambda *_: ran.append(part))
            return made

    shape = ModelShape(**BASE)
    for recompute, times in (("none", 1), ("full", 3), ("selective", 3)):
        ran.clear()
        step(shape, recompute, Watched(shape))
        assert ran.count(Part("norm", 1)) == times * MICROBATCHES
        assert ran.count(Part("qkv", 1)) == min(times, 2) * MICROBATCHES


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_take_the_places_of_what_they_are_of(kv_heads: int, threads: int) -> None:
    torch.set_num_threads(threads)
    given = [torch.randn(1, 9, heads, 8, dtype=torch.float64) for heads in (6, kv_heads, kv_heads)]
    gradient = torch.randn(1, 9, 48, dtype=torch.float64)
    found = []
    for in_place in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        made = torch.autograd.grad(attend(*leaves, Rule(), AttentionState(in_place=in_place)), leaves, gradient)
        is_there = [grad.data_ptr() == leaf.data_ptr() for grad, leaf in zip(made, leaves, strict=True)]
        assert is_there == [in_place and kv_heads >= 2 * threads] * 3
        found.append(made)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("batch", "kv_heads", "threads", "expected"),
    [
        (1, 8, 1, 1),
        (1, 8, 4, 4),
        (2, 8, 4, 2),
        (3, 8, 4, 4),
        (4, 8, 4, 1),
        (8, 8, 4, 1),
        (1, 2, 4, 2),
        (2, 8, 3, 3),
        (1, 7, 4, 7),
        (1, 5, 2, 2),
    ],
)
def test_every_thread_has_as_many_heads(batch: int, kv_heads: int, threads: int, expected: int) -> None:
    assert heads_at_once("cpu", batch, 5000, kv_heads, threads) == expected
    assert heads_at_once("cuda", batch, 5000, kv_heads, threads) == kv_heads


def test_few_tokens_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [heads_at_once("cpu", 1, tokens, 8, 1) for tokens in (2047, 2048)] == [8, 1]


@pytest.mark.parametrize(
    ("kinds", "again", "in_place"),
    [
        ("norm qkv attn proj mlp", "n", True),
        ("norm qkv attn proj", "n", True),
        ("norm qkv attn", "n", True),
        ("norm qkv", "", False),  # made again at once, it would be as if kept
        ("qkv attn", "", True),  # n came in a message
        ("attn", "", False),  # q, k and v did
    ],
)
def test_what_a_chunk_does_without(kinds: str, again: str, in_place: bool) -> None:
    (chunk,) = chunks(Stage(tuple(Part(kind, 0) for kind in kinds.split())), whole=False)
    places = range(len(chunk.parts))
    assert [v for place in places for v in chunk.made_again(place)] == [Value(name, 0) for name in again]
    assert any(map(chunk.in_place, places)) is in_place


def test_what_is_handed_on_is_kept() -> None:
    """Where no norm precedes attention n is x, which stays for others."""
    (chunk,) = chunks(Stage(tuple(Part(kind, 0) for kind in ("norm", "qkv", "attn", "proj"))), whole=False)
    for norms, keeps in (("before", False), ("after", True)):
        for recompute in ("none", "full"):
            work = Work(ModelShape(**BASE, norms=norms), Batch(1, (LENGTH,)), keeping=Keeping(recompute))
            assert ("n.0" in chunk.saved(1, work)) is (keeps or recompute == "none")


def test_what_others_read_stays() -> None:
    """n leaves the stage, and v."""
    parts = tuple(Part(kind, 0) for kind in ("norm", "qkv", "attn", "proj"))
    (chunk,) = chunks(Stage(parts), False, [Value("n", 0), Value("v", 0), Value("y", 0)])
    assert not any(chunk.made_again(place) or chunk.in_place(place) for place in range(4))
