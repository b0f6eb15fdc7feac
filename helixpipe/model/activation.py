"""Activations between linear layers, elementwise, with backwards that make no more tensors than they must.

They run outside of autograd, inside a linear layer that keeps what they read (`model.linear`).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(Protocol):
    """From tensors of one shape to one of that shape."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """A tensor of its own, without a graph."""

    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs from that of the output, which may be overwritten."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The same as `forward`, with autograd's graph."""


class GELU:
    def __init__(self, approximate: str = "none") -> None:
        """`approximate`: as in torch, none or tanh."""
        self.approximate = approximate

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return F.gelu(x, approximate=self.approximate)

    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (aten.gelu_backward.grad_input(grad, *inputs, approximate=self.approximate, grad_input=grad),)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.forward(*inputs)


class SwiGLU:
    """silu(gate) * up (arXiv 2002.05202)"""

    def forward(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        return F.silu(gate).mul_(up)

    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        gate, up = inputs
        dup = F.silu(gate).mul_(grad)
        dgate = grad.mul_(up)
        return aten.silu_backward.grad_input(dgate, gate, grad_input=dgate), dup

    def __call__(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        return F.silu(gate) * up


class GeGLU:
    """gelu(gate) * up (arXiv 2002.05202)"""

    def __init__(self, approximate: str = "none") -> None:
        """`approximate`: as in torch, none or tanh."""
        self.gelu = GELU(approximate)

    def forward(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        return self.gelu(gate).mul_(up)

    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        gate, up = inputs
        dup = self.gelu(gate).mul_(grad)
        (dgate,) = self.gelu.backward(grad.mul_(up), gate)
        return dgate, dup

    def __call__(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        return self.gelu(gate) * up


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": SwiGLU(), "geglu": GeGLU(), "geglu_tanh": GeGLU("tanh"), "gelu": GELU(), "gelu_tanh": GELU("tanh"),
}  # fmt: skip
"""By `ModelShape.mlp`."""
