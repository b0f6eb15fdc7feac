"""Chunked: a module applied to slices of the sequence, so that its inside never exists whole.

Forward keeps the input alone; backward runs one slice forward again, differentiates it and lets it go before the next;
weight gradients are never put off, which would keep the inside alive. For the MLP this bounds the 4h- or 8h-wide
intermediate, for the head its logits (HelixPipe, section 4.5). The price is one more forward of the module; a recompute
whose output nobody reads leaves its own out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from helixpipe.model.linear import at_once

_UNREAD = "output_is_unread"


class Chunked(nn.Module):
    """A module that may run over slices of the sequence."""

    chunk: int = 0
    """Tokens at a time, of the whole sequence; 0 is all at once."""
    shards: int = 1
    """Ranks that share a sequence (cp x tp)."""

    @property
    def local_chunk(self) -> int:
        """Tokens at a time on each of these ranks."""
        return max(self.chunk // self.shards, 1) if self.chunk else 0


class Whole(Protocol):
    """A module whose `whole` treats every token alone."""

    def whole(self, x: Tensor, *others: Tensor) -> Tensor: ...


class Made(NamedTuple):
    """What a module makes of all tokens: [b, s, ...]."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: Whole, chunk: int, made: Made | None, x: Tensor, *others: Tensor) -> Tensor:
        """`made`: None where it is one sum."""
        ctx.module, ctx.chunk, ctx.joined = module, chunk, made is not None
        ctx.save_for_backward(x, *others)
        ctx.unread = getattr(module, _UNREAD, False)
        if ctx.unread:  # the backward needs x alone
            shape, dtype = made or Made((), wide_dtype(x))
            return x.new_zeros((1,) * len(shape), dtype=dtype).expand(shape)
        pieces = zip(*(t.split(chunk, 1) for t in (x, *others)), strict=True)
        if made is None:
            return torch.stack([module.whole(*piece) for piece in pieces]).sum(0)
        result = x.new_empty(made.shape, dtype=made.dtype)
        for out, piece in zip(result.split(chunk, 1), pieces, strict=True):
            out.copy_(module.whole(*piece))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        # where nobody reads what was made, its gradient is nobody else's
        in_place = ctx.unread and grad.shape == x.shape and grad.is_contiguous()
        result = grad if in_place else torch.empty_like(x)
        for start in range(0, x.shape[1], ctx.chunk):
            here = slice(start, start + ctx.chunk)
            piece = x[:, here].detach().requires_grad_()
            with torch.enable_grad(), at_once(cast(nn.Module, ctx.module)):
                # the slice's output goes; parameters collect their gradients as they would in one backward of the whole
                edge = get_gradient_edge(ctx.module.whole(piece, *(t[:, here] for t in others)))
                torch.autograd.backward([edge], [grad[:, here] if ctx.joined else grad])
            assert piece.grad is not None
            result[:, here] = piece.grad
        return None, None, None, result, *(None for _ in others)


@contextmanager
def unread(module: nn.Module) -> Iterator[None]:
    """Within it, a chunked module does not compute what it returns: a recompute wants only its backward."""
    setattr(module, _UNREAD, True)
    try:
        yield
    finally:
        delattr(module, _UNREAD)


def wide_dtype(x: Tensor) -> torch.dtype:
    """That of logits, and of a loss: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def chunked(module: Whole, chunk: int, x: Tensor) -> Tensor:
    """module.whole(x), from [b, s, h] to [b, s, h]; `chunk` tokens at a time."""
    return chunked_into(Made(tuple(x.shape), x.dtype), module, chunk, x)


def chunked_into(made: Made, module: Whole, chunk: int, x: Tensor, *others: Tensor) -> Tensor:
    """module.whole(x, *others), which makes something of each token alone; `chunk` tokens at a time."""
    if not 0 < chunk < x.shape[1]:
        return module.whole(x, *others)
    return _Chunked.apply(module, chunk, made, x, *others)  # type: ignore[no-any-return,no-untyped-call]


def chunked_sum(module: Whole, chunk: int, x: Tensor, *others: Tensor) -> Tensor:
    """module.whole(x, *others), a loss summed over tokens, of targets and what else is [b, s]; `chunk` tokens at a time."""
    if not 0 < chunk < x.shape[1]:
        return module.whole(x, *others)
    return _Chunked.apply(module, chunk, None, x, *others)  # type: ignore[no-any-return,no-untyped-call]
