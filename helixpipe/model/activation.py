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
    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return F.gelu(x)

    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (aten.gelu_backward.grad_input(grad, *inputs, grad_input=grad),)

    def __call__(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return F.gelu(x)


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
