"""Kernels alike: a log-sum-exp of [b, heads, s], whatever the kernel writes and reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import plain_attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helixpipe.model import capped, kernels
from helixpipe.model.kernels import _padded, attention_backward, attention_forward
from helixpipe.model.merging import merge


class OnCuda(torch.Tensor):
    """A tensor that says so and is not."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


# causality in the explicit one needs a mask on its device
@pytest.mark.parametrize(("kind", "causal"), [(Tensor, True), (Tensor, False), (OnCuda, False)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 0.0), (0.0, 0.7), (1.5, 0.0), (0.8, 0.7)])
def test_equals_plain_autograd(kind: type[Tensor], causal: bool, kv_heads: int, softcap: float, scale: float) -> None:
    """The CPU's kernel, the explicit one that CUDA has for float64, and ours of capped scores."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 20, 8) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = plain_attention(*leaves, causal, softcap=softcap, scale=scale)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]
    given = [t.as_subclass(kind) for t in (q, k, v, grad)]
    found = [*attention_forward(*given[:3], causal, softcap, scale)]
    found += attention_backward(given[3], *given[:3], *found, causal, softcap, scale)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.as_subclass(Tensor), plain, rtol=1e-12, atol=1e-12)


def forward(q: Tensor, k: Tensor, v: Tensor, *others: object, scale: float | None) -> tuple[Tensor, Tensor]:
    """As the efficient kernel: a row of the log-sum-exp is a multiple of 32."""
    out, lse = attention_forward(*(t.as_subclass(Tensor) for t in (q, k, v)), causal=others[-1], scale=scale or 0.0)
    padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("inf"))
    padded[..., : lse.shape[2]] = lse
    return out.as_subclass(OnCuda), padded.as_subclass(OnCuda)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, lse: Tensor, *others: object,
    scale: float | None,
) -> Any:  # fmt: skip
    assert lse.shape[2] % 32 == 0
    assert lse[..., q.shape[2] :].isposinf().all()
    given = [t.as_subclass(Tensor) for t in (grad, q, k, v, out, lse[..., : q.shape[2]])]
    gradients = attention_backward(*given, causal=others[-1], scale=scale or 0.0)
    return *(t.as_subclass(OnCuda) for t in gradients), None


def test_a_kernel_that_pads_serves_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a padded log-sum-exp: a segment of 20 after one of 30 could not be merged or differentiated."""
    generator = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 2, 4, 20, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 30, 8, generator=generator)

    def segment(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        own, scale = (k[:, :, :20], v[:, :, :20]), 0.3
        out, lse = merge(
            *attention_forward(q, *own, True, scale=scale), *attention_forward(q, k, v, False, scale=scale)
        )
        return [lse, *attention_backward(grad, q, k, v, out, lse, False, scale=scale)]

    expected = segment(q, k, v, grad)
    fake = SimpleNamespace(
        _scaled_dot_product_flash_attention_for_cpu=kernels.aten._scaled_dot_product_flash_attention_for_cpu,
        _scaled_dot_product_flash_attention_for_cpu_backward=kernels.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        _scaled_dot_product_efficient_attention=forward,
        _scaled_dot_product_efficient_attention_backward=backward,
    )
    monkeypatch.setattr(kernels, "aten", fake)
    found = segment(*(t.as_subclass(OnCuda) for t in (q, k, v, grad)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.as_subclass(Tensor), theirs)


def test_a_padded_log_sum_exp_weighs_nothing() -> None:
    lse = torch.rand(2, 4, 20)
    padded = _padded(lse)
    assert padded.shape == (2, 4, 32)
    assert torch.equal(padded[..., :20], lse)
    assert torch.exp(-padded[..., 20:]).count_nonzero() == 0
    assert torch.equal(_padded(padded), padded)


def test_rows_of_a_log_sum_exp_need_not_be_contiguous() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 2, 24, 8, generator=generator)
    out, lse = attention_forward(q, k, v, False)
    rows = slice(None), slice(None), slice(8, 20)
    found = attention_backward(grad[rows], q[rows], k, v, out[rows], lse[rows], False)
    expected = attention_backward(grad[rows], q[rows], k, v, out[rows], lse[rows].contiguous(), False)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (7, 3), (3, 7), (1, 30)])
@pytest.mark.parametrize("causal", [True, False])
def test_capped_scores_are_there_block_by_block(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, causal: bool
) -> None:
    """Blocks that divide nothing, more keys than queries, fewer heads of keys; and no product is larger than a block."""
    monkeypatch.setattr(capped, "ROWS", rows)
    monkeypatch.setattr(capped, "COLUMNS", columns)
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 6, 20, 8), (2, 2, 23, 8), (2, 2, 23, 8), (2, 6, 20, 8)]
    q, k, v, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = plain_attention(*leaves, causal, softcap=1.5, scale=0.7)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]
    with Largest() as largest:
        found = [*attention_forward(q, k, v, causal, 1.5, 0.7)]
        found += attention_backward(grad, q, k, v, *found, causal, 1.5, 0.7)
    assert largest.elements <= max(2 * 6 * min(rows, 20) * min(columns, 23), 2 * 6 * 20 * 8)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most elements that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_capped_scores_are_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (t.to(dtype) for t in torch.randn(4, 1, 2, 300, 16, generator=generator, dtype=torch.float64))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, _ = plain_attention(*leaves, True, softcap=2.0)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    mine, lse = attention_forward(q, k, v, True, 2.0)
    found = [mine, *attention_backward(grad, q, k, v, mine, lse, True, 2.0)]
    for each, plain in zip(found, expected, strict=True):
        assert each.dtype == dtype
        error = (each.double() - plain).norm() / plain.norm()
        assert error < (6e-3 if dtype == torch.bfloat16 else 1e-6)
