"""Linear: torch's, with a backward that can put the weight gradient off.

    B   grad of x now, grad of weight now
    I   grad of x now; (x, grad) goes into the queue        W   the queue's products, added in place

Nothing is computed twice and nothing else changes: the split is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.attention import Holder


@dataclass
class WeightQueue:
    """Weight gradients put off: (parameter, x, grad), while it is open."""

    keep: Callable[[Tensor], Holder]
    open: bool = False
    waiting: list[tuple[nn.Parameter, Holder, Holder]] = field(default_factory=list)

    def put(self, weight: nn.Parameter, x: Tensor, grad: Tensor) -> None:
        self.waiting.append((weight, self.keep(x), self.keep(grad)))

    def take(self) -> list[tuple[nn.Parameter, Holder, Holder]]:
        """What waits, which then waits no more here."""
        taken, self.waiting = self.waiting, []
        return taken


def add_product(weight: nn.Parameter, x: Tensor, grad: Tensor) -> None:
    """Add a linear layer's weight gradient, [out, into] = grad^T x, to what the parameter has; in place."""
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    if weight.grad is None:
        weight.grad = grad.mT @ x
    else:
        weight.grad.addmm_(grad.mT, x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Linear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        linear: Linear = ctx.linear
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        db = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if linear.queue is not None and linear.queue.open:
            assert isinstance(linear.weight, nn.Parameter)
            linear.queue.put(linear.weight, x, grad)
            return dx, None, db, None
        return dx, grad.flatten(0, -2).mT @ x.flatten(0, -2), db, None


@contextmanager
def at_once(module: nn.Module) -> Iterator[None]:
    """Within it, no linear layer of `module` puts anything off."""
    queues = {id(m.queue): m.queue for m in module.modules() if isinstance(m, Linear) and m.queue is not None}
    were_open = [queue for queue in queues.values() if queue.open]
    for queue in were_open:
        queue.open = False
    try:
        yield
    finally:
        for queue in were_open:
            queue.open = True


class Linear(nn.Linear):
    """x [..., into] -> [..., out]. With no queue it is torch's linear layer."""

    queue: WeightQueue | None = None
    scatter: Callable[[Tensor], Tensor] | None = None
    """Where ranks divide `into`: from this rank's product to its share of the sum of theirs; the bias comes after."""

    def forward(self, x: Tensor) -> Tensor:
        if self.scatter is None:
            return _Linear.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return,no-untyped-call]
        y = self.scatter(_Linear.apply(x, self.weight, None, self))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias
