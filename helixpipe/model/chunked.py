"""Chunked: a module applied to slices of the sequence, so that its inside never exists whole.

Forward keeps the input alone; backward runs one slice forward again, differentiates it and lets it go
before the next. For the MLP this bounds the 4h- or 8h-wide intermediate, for the head its logits
(HelixPipe, section 4.5). The price is one more forward of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Slice = Callable[..., Tensor]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: Slice, chunk: int, joined: bool, x: Tensor, *others: Tensor) -> Tensor:
        ctx.module, ctx.chunk, ctx.joined = module, chunk, joined
        ctx.save_for_backward(x, *others)
        pieces = zip(*(t.split(chunk, 1) for t in (x, *others)), strict=True)
        if not joined:
            return torch.stack([module(*piece) for piece in pieces]).sum(0)
        result = torch.empty_like(x)
        for out, piece in zip(result.split(chunk, 1), pieces, strict=True):
            out.copy_(module(*piece))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        result = torch.empty_like(x)
        for start in range(0, x.shape[1], ctx.chunk):
            here = slice(start, start + ctx.chunk)
            piece = x[:, here].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.module(piece, *(t[:, here] for t in others))
            # parameters collect their gradients as they would in one backward of the whole
            torch.autograd.backward(out, grad[:, here] if ctx.joined else grad)
            assert piece.grad is not None
            result[:, here] = piece.grad
        return None, None, None, result, *(None for _ in others)


def chunked(module: Slice, chunk: int, x: Tensor) -> Tensor:
    """module(x) for a module from [b, s, h] to [b, s, h] that treats every token alone; `chunk` tokens at a time."""
    if not 0 < chunk < x.shape[1]:
        return module(x)
    return _Chunked.apply(module, chunk, True, x)  # type: ignore[no-any-return,no-untyped-call]


def chunked_sum(module: Slice, chunk: int, x: Tensor, targets: Tensor) -> Tensor:
    """module(x, targets) for a module that sums a loss over tokens; `chunk` tokens at a time."""
    if not 0 < chunk < x.shape[1]:
        return module(x, targets)
    return _Chunked.apply(module, chunk, False, x, targets)  # type: ignore[no-any-return,no-untyped-call]
