"""Linear: torch's, with a backward that can put the weight gradient off.

    B   grad of x now, grad of weight now
    I   grad of x now; (x, grad) goes into the queue        W   the queue's products, added in place

Nothing is computed twice and nothing else changes: the split is exact.

A layer may be given an activation to apply first. Then it keeps what the activation reads and makes the activated
tensor anew in the backward: elementwise work costs little, and the tensor is the widest of a layer.

A layer may have an adapter (`parts.lora`): two narrow matrices whose product is added to its own. Between them is all that
it keeps more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.activation import Activation
from helixpipe.model.function import Function, Holder, Saver, active, save, saved
from helixpipe.parts.lora import Lora
from helixpipe.parts.shape import ModelShape


@dataclass
class WeightQueue:
    """Weight gradients put off: (parameter, x, grad), while it is open. And who keeps what its layers read for them."""

    keep: Callable[[Tensor], Holder]
    collect: Callable[[nn.Parameter, Tensor, Tensor], None] | None = None
    """What adds a weight gradient, of (parameter, x, grad), where it belongs; None: autograd does."""
    open: bool = False
    waiting: list[tuple[nn.Parameter, Holder, Holder]] = field(default_factory=list)
    save: Callable[[Tensor], Holder] = field(init=False)
    """Of what a graph needs: `keep`, or what makes it again."""

    def __post_init__(self) -> None:
        self.save = self.keep

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


def same(x: Tensor) -> Tensor:
    return x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return F.linear(x, weight)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])  # not F.linear's, which is a view that nobody may add to
    torch.addmm(bias, x.flatten(0, -2), weight.mT, out=out.view(-1, weight.shape[0]))
    return out


class _Linear(Function):
    """activation(*inputs) [..., into] -> [..., out]. `saver`: None is autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        linear: Linear,
        activation: Activation | None,
        saver: Saver | None,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        save(ctx, saver, *(inputs if linear.keeps_input or activation is not None else ()))
        ctx.linear, ctx.activation, ctx.weight = linear, activation, weight
        return _product(inputs[0] if activation is None else activation.forward(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, activation = ctx.weight, ctx.activation
        _held, inputs = saved(ctx)
        needs_dw, needs_db, *needs_dx = ctx.needs_input_grad[3:]
        dw = None
        if needs_dw:  # what is activated goes before its gradient comes
            x = inputs[0] if activation is None else activation.forward(*inputs)
            dw = _weight_gradient(ctx.linear, x, grad)
            del x
        db = grad.flatten(0, -2).sum(0) if needs_db else None
        if not any(needs_dx):
            return None, None, None, dw, db, *(None for _ in needs_dx)
        dx = grad @ weight
        return None, None, None, dw, db, *((dx,) if activation is None else activation.backward(dx, *inputs))


class _Adapted(Function):
    """The same with an adapter beside it: y += (scale * x down^T) up^T, down [rank, into] and up [out, rank]."""

    @staticmethod
    def forward(
        ctx: Any,
        linear: Linear,
        activation: Activation | None,
        saver: Saver | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        x = inputs[0] if activation is None else activation.forward(*inputs)
        y = _product(x, weight, bias)
        narrow = F.linear(x, down).mul_(linear.scale)
        del x
        y.view(-1, y.shape[-1]).addmm_(narrow.flatten(0, -2), up.mT)
        save(ctx, saver, narrow, *inputs)
        ctx.linear, ctx.activation, ctx.weights = linear, activation, (weight, down, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, down, up), (_held, (narrow, *inputs)) = ctx.weights, saved(ctx)
        linear, activation = ctx.linear, ctx.activation
        needs_dw, needs_db, needs_down, needs_up, *needs_dx = ctx.needs_input_grad[3:]
        dnarrow = (grad @ up).mul_(linear.scale)
        dw = ddown = None
        if needs_dw or needs_down:  # what is activated goes before its gradient comes
            x = inputs[0] if activation is None else activation.forward(*inputs)
            dw = _weight_gradient(linear, x, grad) if needs_dw else None
            ddown = _weight_gradient(linear.lora_a, x, dnarrow) if needs_down else None
            del x
        dup = _weight_gradient(linear.lora_b, narrow, grad) if needs_up else None
        db = grad.flatten(0, -2).sum(0) if needs_db else None
        if not any(needs_dx):
            return None, None, None, dw, db, ddown, dup, *(None for _ in inputs)
        dx = grad @ weight
        dx.view(-1, dx.shape[-1]).addmm_(dnarrow.flatten(0, -2), down)
        of_inputs = (dx,) if activation is None else activation.backward(dx, *inputs)
        return None, None, None, dw, db, ddown, dup, *of_inputs


def _weight_gradient(linear: Linear, x: Tensor, grad: Tensor) -> Tensor | None:
    """None when it is put off, or is where it belongs already."""
    queue = linear.queue
    if queue is None or not (queue.open or queue.collect):
        return grad.flatten(0, -2).mT @ x.flatten(0, -2)
    assert isinstance(linear.weight, nn.Parameter)
    if queue.open:
        queue.put(linear.weight, x, grad)
    elif queue.collect is not None:
        queue.collect(linear.weight, x, grad)
    return None


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
    keeps_input: bool = True
    """Whether what it multiplies is kept for a weight gradient; there is none where all but adapters is frozen."""

    def __init__(self, into: int, out: int, bias: bool = True, lora: Lora | None = None) -> None:
        """`lora`: the adapter that it has."""
        super().__init__(into, out, bias)
        self.lora_a = None if lora is None else Linear(into, lora.rank, bias=False)
        self.lora_b = None if lora is None else Linear(lora.rank, out, bias=False)
        self.scale = 1.0 if lora is None else lora.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(None, x)

    def activated(self, activation: Activation | None, *inputs: Tensor) -> Tensor:
        """This layer of activation(*inputs), which is not kept."""
        inside = self.bias if self.scatter is None else None
        y: Tensor
        if self.lora_a is None or self.lora_b is None:
            y = _Linear.apply(self, activation, active(self.queue), self.weight, inside, *inputs)
        else:
            narrow = self.lora_a.weight, self.lora_b.weight
            y = _Adapted.apply(self, activation, active(self.queue), self.weight, inside, *narrow, *inputs)
        if self.scatter is None:
            return y
        return self.scatter(y) if self.bias is None else self.scatter(y) + self.bias


def adaptable(shape: ModelShape, name: str, into: int, out: int, bias: bool) -> Linear:
    """The linear layer of a name, with the adapter that a model's shape gives it."""
    return Linear(into, out, bias, shape.lora if shape.lora is not None and name in shape.lora.targets else None)


def added(maker: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """x + y, where y is what `maker` made: in its place, unless the module is someone's own, which may have kept it."""
    return y.add_(x) if isinstance(maker, Linear | nn.RMSNorm | nn.LayerNorm) else x + y


def activated(linear: nn.Module, activation: Activation, *inputs: Tensor) -> Tensor:
    """linear(activation(*inputs)); what is activated is not kept, unless the layer is someone's own."""
    if isinstance(linear, Linear):
        return linear.activated(activation, *inputs)
    found: Tensor = linear(activation(*inputs))
    return found
