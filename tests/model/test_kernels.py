"""Kernels alike: a log-sum-exp of [b, heads, s], whatever the kernel writes and reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import plain_attention
from torch import Tensor

from helixpipe.model import kernels
from helixpipe.model.attention import merge
from helixpipe.model.kernels import _padded, attention_backward, attention_forward


class OnCuda(torch.Tensor):
    """A tensor that says so and is not."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


# causality in the explicit one needs a mask on its device
@pytest.mark.parametrize(("kind", "causal"), [(Tensor, True), (Tensor, False), (OnCuda, False)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_plain_autograd(kind: type[Tensor], causal: bool, kv_heads: int) -> None:
    """The CPU's kernel, and the explicit one that CUDA has for float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 20, 8) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = plain_attention(*leaves, causal)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]
    given = [t.as_subclass(kind) for t in (q, k, v, grad)]
    found = [*attention_forward(*given[:3], causal)]
    found += attention_backward(given[3], *given[:3], *found, causal)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.as_subclass(Tensor), plain, rtol=1e-12, atol=1e-12)


def forward(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """As the efficient kernel: a row of the log-sum-exp is a multiple of 32."""
    out, lse = attention_forward(*(t.as_subclass(Tensor) for t in (q, k, v)), causal=others[-1])
    padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("inf"))
    padded[..., : lse.shape[2]] = lse
    return out.as_subclass(OnCuda), padded.as_subclass(OnCuda)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, lse: Tensor, *others: object
) -> Any:
    assert lse.shape[2] % 32 == 0
    assert lse[..., q.shape[2] :].isposinf().all()
    given = [t.as_subclass(Tensor) for t in (grad, q, k, v, out, lse[..., : q.shape[2]])]
    return *(t.as_subclass(OnCuda) for t in attention_backward(*given, causal=others[-1])), None


def test_a_kernel_that_pads_serves_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a padded log-sum-exp: a segment of 20 after one of 30 could not be merged or differentiated."""
    generator = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 2, 4, 20, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 30, 8, generator=generator)

    def segment(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        own = k[:, :, :20], v[:, :, :20]
        out, lse = merge(*attention_forward(q, *own, True), *attention_forward(q, k, v, False))
        return [lse, *attention_backward(grad, q, k, v, out, lse, False)]

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
