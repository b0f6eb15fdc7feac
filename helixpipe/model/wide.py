"""Wide: a weight gradient of narrow matrices, added to a wider sum inside the matrix product.

    bfloat16   grad^T x ──► rounded to bfloat16 ──► added in float32       a rounding each micro-batch
    here       grad^T x + sum, all of it in float32                        none

torch has such a product for CUDA, and not in all its versions: it is tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
SIDE = 8


def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of matrices of `dtype` to float32 there."""
    if dtype not in HALVES:
        return False
    ones = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    total = torch.ones(SIDE, SIDE, device=device)
    try:
        add_wide(total, ones, ones)
    except (AttributeError, RuntimeError):  # no such overload; none for this device, or for a sum that is wider
        return False
    return bool((total == SIDE + 1).all())


def add_wide(total: Tensor, x: Tensor, grad: Tensor) -> None:
    """total [out, into], float32, += grad^T x; x [..., into], grad [..., out]."""
    product = grad.flatten(0, -2).mT, x.flatten(0, -2)
    aten.addmm.dtype_out(total, *product, torch.float32, out=total)
