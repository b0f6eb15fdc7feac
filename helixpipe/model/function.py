"""Function: torch's, of layers that a pipeline runs by the thousand.

    apply    without what functorch asks of each argument of each call: none is transformed
    save     a pipeline keeps what a backward needs itself; autograd would ask it for each tensor, twice, at a layer's price

Parameters, and tables that stay, are not saved at all: nothing changes them between a forward and its backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Holder(Protocol):
    """Something that keeps a tensor alive, and is counted for it."""

    @property
    def tensor(self) -> Tensor: ...


class Saver(Protocol):
    """What keeps tensors for backwards."""

    @property
    def save(self) -> Any: ...


class Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        whole = torch.autograd.Function
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(whole, cls).apply(*args)  # type: ignore[misc]  # what it comes to


def save(ctx: Any, saver: Saver | None, *tensors: Tensor) -> None:
    """For the backward. `saver`: None is autograd."""
    ctx.held = None if saver is None else [saver.save(tensor) for tensor in tensors]
    if saver is None:
        ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Sequence[Holder], list[Tensor]]:
    """What was saved, and what holds it: it goes when the backward lets go of both. Autograd's is there for another backward."""
    held = ctx.held
    if held is None:
        return (), list(ctx.saved_tensors)
    ctx.held = ()
    return held, [each.tensor for each in held]


def active(saver: Saver | None) -> Saver | None:
    """The saver, where there will be a backward."""
    return saver if saver is not None and torch.is_grad_enabled() else None
