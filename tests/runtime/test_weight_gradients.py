"""Weight gradients that W adds: to what is there, in the memory that is there."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from oracle import batch
from ranks import Ranks, mesh_of
from torch import nn

from helixpipe.model.decoder import Decoder
from helixpipe.model.linear import add_product
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19)


class Step(NamedTuple):
    """By name of a linear layer's weight, after a step."""

    pointers: dict[str, int]
    gradients: dict[str, torch.Tensor]


def two_steps(ranks: int, dtype: torch.dtype) -> list[Step] | None:
    """Two steps on the same batch, and gradients not zeroed between them."""
    mesh = mesh_of(ranks)
    if mesh is None:
        return None
    schedule = build_schedule("zb_h1", ranks=ranks, layers=SHAPE.layers, microbatches=3)
    pipeline = Pipeline(Decoder(SHAPE), schedule, mesh, dtype=dtype, timeout_s=30)
    weights = {n: p for n, p in pipeline.parameters.items() if p.dim() == 2 and not n.startswith("embed")}
    steps = []
    for _ in range(2):
        pipeline.step(*batch(SHAPE, 3, 12))
        grads = {name: weight.grad for name, weight in weights.items()}
        pointers = {name: grad.data_ptr() for name, grad in grads.items()}
        steps.append(Step(pointers, {name: grad.clone() for name, grad in grads.items()}))
    pipeline.close()
    return steps


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_step_adds_in_place(four_ranks: Ranks, ranks: int, dtype: torch.dtype, error: float) -> None:
    weights = 0
    for first, second in four_ranks.run(two_steps, ranks, dtype)[:ranks]:
        assert first.pointers == second.pointers
        for name, once in first.gradients.items():
            assert (second.gradients[name] - 2 * once).norm() <= error * once.norm(), name
        weights += len(first.gradients)
    assert weights == 7 * SHAPE.layers + 1  # q, k, v, o, gate, up, down of each layer; the head's


def test_a_product_is_added_in_place() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    x, grad = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    with torch.no_grad():
        add_product(weight, x, grad)
        first, pointer = weight.grad.clone(), weight.grad.data_ptr()
        add_product(weight, x, grad)
    torch.testing.assert_close(first, torch.einsum("bso,bsi->oi", grad, x))
    torch.testing.assert_close(weight.grad, 2 * first)
    assert weight.grad.data_ptr() == pointer
