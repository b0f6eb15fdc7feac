"""Fused attention forward and backward with log-sum-exp, on tensors [b, heads, s, head_dim].

Each forward gives (out, lse) and each backward takes them, so that an output kept from an earlier run can
be differentiated without running attention again. `lse` is [b, heads, s], float32 or wider, whatever a kernel's own
looks like.

Scores are q.k times `scale` (0: head_dim ** -0.5). Where they are capped, to c * tanh(score / c), no fused kernel serves:
`model.capped` does.

    CPU                 its flash attention
    CUDA, half          flash, or as asked: cudnn, efficient       float32   efficient       float64   torch's operations
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.model.capped import capped_backward, capped_forward
from helixpipe.model.joint import Joint

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
Kernel = Literal["flash", "cudnn", "efficient"]


class Scores(NamedTuple):
    """What becomes of scores, and by which of CUDA's kernels in half precision."""

    softcap: float = 0.0
    scale: float = 0.0
    kernel: Kernel = "flash"


def check_head_dim(head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError for heads that the fused kernel of a device and precision does not take."""
    if device.type == "cuda" and dtype in HALVES and (head_dim % 8 or head_dim > 256):
        raise ConfigError(
            f"model.head_dim: {head_dim}; attention on CUDA in {str(dtype).removeprefix('torch.')} needs a multiple of 8 "
            "up to 256: change it, or set runtime.dtype to float32"
        )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softcap: float = 0.0, scale: float = 0.0, kernel: Kernel = "flash"
) -> tuple[Tensor, Tensor]:
    """Attention by a fused kernel of the device; k and v may have fewer heads."""
    if softcap:
        return capped_forward(q, k, v, causal, softcap, scale or q.shape[-1] ** -0.5)
    given = scale or None
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=given)
        return out, lse
    halves = q.device.type == "cuda" and q.dtype in HALVES
    if halves and kernel == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=given)
        return out, lse
    if halves and kernel == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=given)
        return out, lse.reshape(q.shape[:3])
    k, v = _repeated(q, k), _repeated(q, v)
    if halves or (q.device.type == "cuda" and q.dtype == torch.float32):
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=given)
        return out, lse[..., : q.shape[2]].contiguous()
    scores = _scores(q, k, causal, scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    softcap: float = 0.0, scale: float = 0.0, kernel: Kernel = "flash",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, by the kernel that `attention_forward` would choose."""
    if softcap:
        return capped_backward(grad, q, k, v, out, lse, causal, softcap, scale or q.shape[-1] ** -0.5)
    given = scale or None
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=given
        )
        return dq, dk, dv
    halves, lengths = q.device.type == "cuda" and q.dtype in HALVES, (q.shape[2], k.shape[2])
    if halves and kernel == "flash":
        random = q.new_empty(0, dtype=torch.uint64)  # no dropout, so never read
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, causal, random, random, scale=given
        )
        return dq, dk, dv
    if halves and kernel == "cudnn":
        random = q.new_zeros((), dtype=torch.int64)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1).contiguous(), random, random, None, None, None, *lengths, 0.0, causal,
            scale=given,
        )  # fmt: skip
        return dq, dk, dv
    whole_k, whole_v = _repeated(q, k), _repeated(q, v)
    if halves or (q.device.type == "cuda" and q.dtype == torch.float32):
        random = q.new_empty(0, dtype=torch.int64)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, whole_k, whole_v, None, out, _padded(lse), random, random, 0.0, [True, True, True, False], causal,
            scale=given,
        )  # fmt: skip
    else:
        weights = (_scores(q, whole_k, causal, scale) - lse.unsqueeze(-1)).exp()
        dv = weights.mT @ grad
        dscores = weights * (grad @ whole_v.mT - (grad * out).sum(-1, keepdim=True)) * (scale or q.shape[-1] ** -0.5)
        dq, dk = dscores @ whole_k, dscores.mT @ q
    return dq, _summed(dk, k), _summed(dv, v)


def fused_jointly(q: Tensor, softcap: float) -> bool:
    """Whether `joint_forward` serves such queries."""
    return q.device.type == "cuda" and q.dtype in HALVES and not softcap


def joint_forward(q: Tensor, k: Tensor, v: Tensor, call: Joint, scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention of a joint call's rows, q [n, heads, d], k and v [keys, kv_heads, d]: out like q, lse [n, heads].

    The kernel of `torch.nn.attention.varlen.varlen_attn`, which cannot be differentiated by a merged lse.
    """
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, call.query_ends, call.key_ends, call.most_queries, call.most_keys, 0.0, call.causal, False,
        scale=scale or None,
    )  # fmt: skip
    return out, lse.T


def joint_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Joint, scale: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of a joint call's rows."""
    random, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)  # no dropout
    dq, dk, dv = aten._flash_attention_backward(
        grad, q, k, v, out, lse.T.contiguous(), call.query_ends, call.key_ends, call.most_queries, call.most_keys, 0.0,
        call.causal, random, unused, scale=scale or None,
    )  # fmt: skip
    return dq, dk, dv


def _padded(lse: Tensor) -> Tensor:
    """The log-sum-exp as the efficient kernel writes and reads it: rows of a multiple of 32."""
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")).contiguous()


def _repeated(q: Tensor, k: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if k.shape[1] != q.shape[1] else k


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    if grad.shape[1] == like.shape[1]:
        return grad
    groups: Tensor = grad.unflatten(1, (like.shape[1], -1))
    summed: Tensor = groups.sum(2)
    return summed


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores: Tensor = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores
