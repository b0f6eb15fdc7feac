"""Kernels alike: a log-sum-exp of [b, heads, s], whatever the kernel writes and reads, on devices that are not here."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helixpipe.model.attention import merge
from helixpipe.model.kernels import _padded, attention_backward, attention_forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shapes_on_an_accelerator(dtype: torch.dtype) -> None:
    """Guards against a padded log-sum-exp: a segment of 20 and one of 50 could not be merged or differentiated."""
    with FakeTensorMode():
        q = torch.empty(2, 4, 20, 32, dtype=dtype, device="cuda")
        k = v = torch.empty(2, 2, 50, 32, dtype=dtype, device="cuda")
        out, lse = merge(*attention_forward(q, k[:, :, :20], v[:, :, :20], True), *attention_forward(q, k, v, False))
        assert lse.shape == (2, 4, 20)
        dq, dk, dv = attention_backward(out.to(dtype), q, k, v, out.to(dtype), lse, False)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)


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
