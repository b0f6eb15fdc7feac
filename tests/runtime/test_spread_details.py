"""A spread vocabulary: precision, documents, what is frozen, values that are not finite, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import batch
from ranks import Ranks, mesh_of
from spreading import spread
from test_spread_vocabulary import check_gradients, joined
from torch import Tensor, nn

import helixpipe as hp

SHAPE = hp.ModelShape(layers=4, hidden=16, heads=4, ffn=24, vocabulary=19, tied=True)
PLAIN = {p: hp.build_schedule("1f1b", ranks=p, layers=4, microbatches=3) for p in (1, 2)}
DOCUMENTS = [[5, 7], [12], [3, 4, 5]]


def gradients_of(pipeline: hp.Pipeline) -> dict[str, Tensor]:
    return {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}


def stepped(
    shape: hp.ModelShape, ranks: int, shards: int, dtype: torch.dtype, documents: Any = None
) -> tuple[float, float, dict[str, Tensor]] | None:
    """On a rank: losses of a step and of an evaluation, and gradients. No shards are a whole head."""
    mesh = mesh_of(ranks)
    if mesh is None:
        return None
    schedule = spread(PLAIN[ranks], shards) if shards else PLAIN[ranks]
    pipeline = hp.Pipeline(hp.Decoder(shape), schedule, mesh, dtype=dtype, timeout_s=30)
    data = batch(shape, 3, 12)
    loss = pipeline.step(*data, documents=documents)
    evaluated = pipeline.evaluate(*data, documents=documents)
    pipeline.close()
    return loss, evaluated, gradients_of(pipeline)


def test_scores_travel_in_float32(four_ranks: Ranks) -> None:
    """Messages change no bit, in bfloat16 either; and the loss is that of a whole head to bfloat16's rounding of f."""
    alone = four_ranks.run(stepped, SHAPE, 1, 2, torch.bfloat16)[0]
    apart = four_ranks.run(stepped, SHAPE, 2, 2, torch.bfloat16)[:2]
    assert [loss for loss, *_ in apart] == [alone[0]] * 2
    assert [evaluated for _, evaluated, _ in apart] == [alone[1]] * 2
    whole = four_ranks.run(stepped, SHAPE, 1, 0, torch.bfloat16)[0]
    assert alone[0] == pytest.approx(whole[0], abs=1e-6)


def test_documents(four_ranks: Ranks) -> None:
    loss, _, gradients = four_ranks.run(stepped, SHAPE, 1, 0, torch.float64, DOCUMENTS)[0]
    found: dict[str, Tensor] = {}
    for mine, evaluated, some in four_ranks.run(stepped, SHAPE, 2, 2, torch.float64, DOCUMENTS)[:2]:
        assert abs(mine - loss) < 1e-12
        assert abs(evaluated - loss) < 1e-12
        found |= some
    check_gradients(joined(found), gradients)


FROZEN: list[dict[str, Any]] = [
    {"frozen": ("embed.tokens.weight",)},
    {"frozen": ("head.*",), "tied": False, "head_transform": True},
    {"frozen": ("*.mlp.*", "embed.*"), "tied": False},
    {"lora": hp.Lora(2)},
]


@pytest.mark.parametrize("more", FROZEN, ids=str)
def test_what_is_frozen(four_ranks: Ranks, more: dict[str, Any]) -> None:
    shape = replace(SHAPE, **more)
    loss, _, gradients = four_ranks.run(stepped, shape, 1, 0, torch.float64)[0]
    results = four_ranks.run(stepped, shape, 2, 2, torch.float64)[:2]
    assert all(abs(result[0] - loss) < 1e-12 for result in results)
    check_gradients(joined({name: each for *_, some in results for name, each in some.items()}), gradients)


def searched(part: str, value: float) -> str | None:
    """On a rank: what is told where a parameter of this part has such a value."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    pipeline = hp.Pipeline(hp.Decoder(replace(SHAPE, tied=False)), spread(PLAIN[2]), mesh, timeout_s=30)
    for name, parameter in pipeline.parameters.items():
        if name.startswith(part):
            parameter.data[3:9] = value
    tokens, targets = batch(SHAPE, 3, 12)
    pipeline.step(tokens, targets)
    told = pipeline.first_nonfinite(tokens=tokens, targets=targets)
    pipeline.close()
    return told


def test_what_made_a_value_that_is_not_finite(four_ranks: Ranks) -> None:
    found = {
        "head.output.weight[9": (3e38, "shard 1 of the 2 of logits, on rank 1, micro-batch 0, forward"),
        "head.norm": (3e38, "the part final, on rank 1, micro-batch 0, forward"),
        "embed.tokens.weight[0": (
            float("nan"), "embed.tokens.weight[0:9/19], on rank 0, which was not finite before the step"
        ),
    }  # fmt: skip
    for part, (value, told) in found.items():
        assert four_ranks.run(searched, part, value)[:2] == [told] * 2


class Own(hp.Decoder):
    def part(self, part: hp.Part) -> nn.Module:
        return super().part(part)


class Knows(Own):
    spreads_vocabulary = True


def test_what_is_refused() -> None:
    """Someone's own parts, of which the head would be left out; fewer words than shards."""
    own = (
        "schedule.vocabulary: spread, and {} hands out parts of its own, of which head and embedding would be left out; use last, "
        "or set spreads_vocabulary to true in a model that knows their shards"
    )
    layers = hp.Layers(nn.Embedding(19, 16), [nn.Linear(16, 16) for _ in range(4)], nn.Linear(16, 19))
    few = hp.Decoder(replace(SHAPE, vocabulary=2))
    refused = [
        (Own(SHAPE), own.format("Own")),
        (layers, own.format("Layers")),
        (few, "schedule.vocabulary: spread over 3 ranks, and model.vocabulary is 2; use last, or fewer ranks"),
    ]
    for model, told in refused:
        with pytest.raises(hp.ConfigError) as error:
            hp.Pipeline(model, spread(PLAIN[1], 3))
        assert str(error.value) == told
    assert hp.Pipeline(Knows(SHAPE), spread(PLAIN[1], 3)).parameters
