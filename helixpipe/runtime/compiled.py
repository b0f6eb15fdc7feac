"""Compiled: what parts compute elementwise, as kernels that torch.compile makes of it, one for each kind.

    norm   x * scale * weight, and its backward       activation   silu(gate) * up, ...       rope   turned q and k

Matrix products and attention are kernels already, and so are torch's own norms on CUDA. Layers share what is compiled, and so do
forwards, recomputes and backwards. Someone else's modules are left alone. A compiled kernel rounds where it likes, and one that was
made for a shape is replaced by one for all when another shape comes: runs agree to rounding and not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from helixpipe.errors import ConfigError
from helixpipe.model.activation import Activation
from helixpipe.model.mlp import MLP
from helixpipe.model.norm import Maths, RMSNorm, rms, rms_backward
from helixpipe.model.qkv import QKV
from helixpipe.model.rope import turned

BACKEND = "inductor"


class Compiler:
    """Of one pipeline, which may be one that has nothing compiled. Raises ConfigError where nothing can be."""

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self.wanted = wanted
        self._made: dict[object, Callable[..., Any]] = {}
        self._activations: dict[int, Compiled] = {}
        if not wanted:
            return
        try:
            if device.type == "cuda":
                import_module("triton")
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        except (ImportError, RuntimeError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"runtime.compile: torch.compile needs a C++ compiler, and on CUDA Triton ({said}); install it, or set "
                "runtime.compile to false"
            ) from None

    def take(self, module: nn.Module) -> None:
        """Let what is this library's in a part run what is compiled, or what is not, whatever it ran before."""
        for inner in module.modules():
            if isinstance(inner, RMSNorm):
                inner.maths = Maths(self._of(rms), self._of(rms_backward))
            if isinstance(inner, MLP):
                inner.activation = self._activation(inner.activation)
            if isinstance(inner, QKV) and inner.rope is not None:
                inner.rope.turned = self._of(turned_at_once) if self.wanted else turned

    def _activation(self, given: Activation) -> Activation:
        plain = given.plain if isinstance(given, Compiled) else given
        if not self.wanted:
            return plain
        if id(plain) not in self._activations:
            self._activations[id(plain)] = Compiled(plain, self._of(plain.forward), self._of(plain.backward))
        return self._activations[id(plain)]

    def _of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled at its first call."""
        if self.wanted and function not in self._made:
            self._made[function] = torch.compile(function, backend=BACKEND)
        return self._made.get(function, function)


class Compiled:
    """An activation whose two ways are compiled."""

    def __init__(self, plain: Activation, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.plain, self._forward, self._backward = plain, forward, backward

    def forward(self, *inputs: Tensor) -> Tensor:
        made: Tensor = self._forward(*inputs)
        return made

    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self._backward(grad, *inputs)
        return found

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.plain(*inputs)


def turned_at_once(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """As `turned`, without a tensor that is filled piece by piece, which nothing would fuse."""
    size = 2 * cos.shape[-1]
    first, second = x[..., :size].chunk(2, -1)
    sin = sin * direction
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., size:]), -1)
