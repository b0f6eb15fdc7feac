"""Weight gradients added in the masters' precision inside the product, where torch can: a stand-in for its kernel, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import batch
from ranks import Ranks, mesh_of
from torch import Tensor

from helixpipe.model import wide as products
from helixpipe.model.decoder import Decoder
from helixpipe.model.wide import add_wide, adds_wide
from helixpipe.parts.lora import Lora
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime import weights as rooms
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=2, hidden=32, heads=4, ffn=64, vocabulary=23)
ADAPTED = ModelShape(layers=2, hidden=32, heads=4, ffn=64, vocabulary=23, lora=Lora(4, targets=("q", "up")))


def test_where_torch_has_no_such_product_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; in a precision of its own; in versions that want the sum as narrow, and whose product is another."""
    cpu = torch.device("cpu")
    assert not adds_wide(cpu, torch.bfloat16)
    assert not adds_wide(cpu, torch.float32)
    monkeypatch.setattr(products, "add_wide", refusing)
    assert not adds_wide(cpu, torch.bfloat16)
    monkeypatch.setattr(products, "add_wide", lambda total, x, grad: total.copy_(grad.mT @ x))
    assert not adds_wide(cpu, torch.bfloat16)
    monkeypatch.setattr(products, "add_wide", lambda total, x, grad: total.add_(grad.mT.float() @ x.float()))
    assert adds_wide(cpu, torch.bfloat16)


def refusing(total: Tensor, x: Tensor, grad: Tensor) -> None:
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


def test_the_product_is_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator exists with these arguments; a sum is added to in its place."""
    schema = torch.ops.aten.addmm.dtype_out._schema
    assert [each.name for each in schema.arguments if not each.has_default_value()] == [
        "self", "mat1", "mat2", "out_dtype", "out",
    ]  # fmt: skip

    def dtype_out(total: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert dtype == torch.float32
        assert out is total
        return out.add_(first.float() @ second.float())

    monkeypatch.setattr(products, "aten", SimpleNamespace(addmm=SimpleNamespace(dtype_out=dtype_out)))
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 4, generator=generator)
    total = torch.ones(4, 3)
    add_wide(total, x, grad)
    assert torch.allclose(total, 1 + torch.einsum("bso,bsi->oi", grad, x))


def run(shape: ModelShape, family: str, ranks: int, wide: bool, chunk: int) -> Any:
    """On a rank: gradients of a step in bfloat16, and of every sum that products were added to the same sum in float64."""
    mesh = mesh_of(ranks)
    if mesh is None:
        return None
    sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(total: Tensor, x: Tensor, grad: Tensor) -> None:
        assert (total.dtype, x.dtype, grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        _, exact = sums.setdefault(id(total), (total, torch.zeros_like(total, dtype=torch.float64)))
        exact += grad.flatten(0, -2).mT.double() @ x.flatten(0, -2).double()
        total += grad.flatten(0, -2).mT.float() @ x.flatten(0, -2).float()

    before: tuple[Callable[..., Any], ...] = rooms.adds_wide, rooms.add_wide
    rooms.adds_wide, rooms.add_wide = (lambda device, dtype: wide), add
    try:
        options = {"travel": "attention"} if family == "helix" else {}
        schedule = build_schedule(family, ranks=ranks, layers=2, microbatches=8, **options)
        model = Decoder(shape, mlp_chunk=chunk, head_chunk=chunk)
        pipeline = Pipeline(model, schedule, mesh, dtype=torch.bfloat16, timeout_s=30)
        loss = pipeline.step(*batch(shape, 8, 16))
    finally:
        rooms.adds_wide, rooms.add_wide = before  # type: ignore[assignment]
    pipeline.close()
    gradients = {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}
    return loss, gradients, [(total.clone(), exact) for total, exact in sums.values()]


@pytest.mark.parametrize(
    ("shape", "family", "ranks", "chunk"),
    [(SHAPE, "1f1b", 1, 0), (SHAPE, "zb_h1", 1, 4), (ADAPTED, "1f1b", 1, 0), (SHAPE, "helix", 2, 0)],
)
def test_sums_are_float32_and_no_product_is_rounded_before(
    four_ranks: Ranks, shape: ModelShape, family: str, ranks: int, chunk: int
) -> None:
    wide = four_ranks.run(run, shape, family, ranks, True, chunk)[:ranks]
    narrow = four_ranks.run(run, shape, family, ranks, False, chunk)[:ranks]
    matrices = 0
    for (loss, found, sums), (plain_loss, plain, none) in zip(wide, narrow, strict=True):
        assert loss == plain_loss
        assert not none
        assert found.keys() == plain.keys()
        for total, exact in sums:
            assert (total - exact).norm() <= 1e-6 * exact.norm()
        matrices += len(sums)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            if not plain[name].any():  # of an adapter whose other matrix is still 0
                assert not gradient.any()
                continue
            error = (gradient - plain[name]).norm() / plain[name].norm()
            assert error < 2e-2, name
            if gradient.dim() > 1 and "embed" not in name:
                assert error > 0, f"{name} was rounded as before"
    linear = 15 if shape is SHAPE else 8
    assert matrices == linear if ranks == 1 else matrices > linear  # a weight that visits has a sum on each rank
