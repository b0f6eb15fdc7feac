"""Layers: plain torch modules as a model. The pipeline looks into none of them.

tokens [b, s] -> embed -> x -> layers[0] -> x -> ... -> head -> loss summed over tokens
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.errors import ConfigError
from helixpipe.model.head import takes_weights
from helixpipe.model.layers_shape import LayersShape
from helixpipe.model.rope import Start
from helixpipe.model.trial import device_of, failed, given_tensors, own_randomness
from helixpipe.parts.head import IGNORED
from helixpipe.parts.part import Part
from helixpipe.parts.work import Work

Loss = Callable[[Tensor, Tensor], Tensor]

# relative; a mean of two halves is half their sum
_ADDS_UP = 0.05


class Layers:
    """A model made of modules of your own, for `Pipeline`, `build_schedule(model=...)`, `simulate` and `Setting(model.shape)`.

    embed    tokens, int64 [b, s] -> x, of any shape: nn.Embedding will do
    layers   x -> x
    head     x -> logits [b, s, classes], or x, targets -> the loss

    The loss is the sum over tokens. The pipeline divides it by the number of targets that are not -100, of the whole batch. With
    no `loss` given, a head whose forward requires two arguments gives the loss itself, and the logits of any other go through
    cross entropy, summed, in float32 or wider. A `loss` is called with the logits of all tokens, [b * s, classes], and targets
    [b * s]. One that gives a mean is refused. A head that gives the loss takes weights of targets where its forward has a parameter
    `weights=None`, [b, s]; a `loss` takes none.

    Every rank makes the same model: all modules, with the same values (seed torch before you make them). A pipeline compares
    them over its ranks. Each rank trains copies of those that it runs; what was given here stays as it is.

    Parameters are named `embed.<name>`, `layers.3.<name>`, `head.<name>`, with the name that they have in their module. One that
    stands in several places is one parameter, and goes by its first name.

    FLOPs and bytes are found out by trials (`model.trial`): one for each size asked for and for each layer unlike the others.
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[nn.Module],
        head: nn.Module,
        loss: Loss | None = None,
        length: int = 16,
    ) -> None:
        """`length`: tokens a sequence of the first trial, which shows that the modules fit together; they must take as many.

        Raises ConfigError for what does not.
        """
        modules = [embed, *layers, head]
        names = ["embed", *(f"layers.{i}" for i in range(len(layers))), "head"]
        for name, module in zip(names, modules, strict=True):
            _check_module(name, module)
        if len(modules) == 2:
            raise ConfigError("layers: there is none; give at least one")
        gives_loss = loss is None and _requires_targets(head)
        if loss is not None and _requires_targets(head):
            raise ConfigError(
                f"head: {type(head).__name__}.forward requires targets, so that it gives the loss; leave `loss` away, or let it "
                "take x alone and give logits"
            )
        weighs = takes_weights(head.forward) if gives_loss else loss is None
        last = (_WeighedHead if weighs else _Head)(head, None if gives_loss else loss or summed_cross_entropy)
        self._pieces = (_Embed(embed), *map(_Layer, layers), last)
        told = [f"{name} ({type(module).__name__})" for name, module in zip(names, modules, strict=True)]
        self.shape = LayersShape.of(self._pieces, names, told, length)
        if gives_loss or loss is not None:
            self._check_sum(told[-1] if loss is None else f"loss ({getattr(loss, '__name__', type(loss).__name__)})")

    def part(self, part: Part) -> nn.Module:
        """A copy of its module. Raises ConfigError for a part that this model does not have."""
        return copy.deepcopy(self._pieces[self.shape.place(part)])

    def digests(self) -> dict[str, int]:
        """A number for the values of each part, 32 bits: the same where they are."""
        return {str(part): _digest(piece) for part, piece in zip(self.shape.chain(), self._pieces, strict=True)}

    @torch.no_grad()
    def _check_sum(self, name: str) -> None:
        """The loss of two sequences is that of one and of the other together, where it is a sum."""
        head = self._pieces[-1]
        copied = copy.deepcopy(head, {id(p): p for p in head.parameters()}).eval()
        part, work = self.shape.chain()[-1], Work(self.shape, self.shape.example(sequences=2))
        given = self.shape.given(part, work)
        dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), torch.float32)
        with own_randomness(device_of(head)):
            x, targets = given_tensors(given, dtype, device_of(head))
            try:
                whole, first, second = (
                    float(copied(x[rows], targets[rows])) for rows in (slice(2), slice(1), slice(1, 2))
                )
            except Exception as error:
                raise failed(name, given, dtype, error) from error
        if abs(whole - (first + second)) > _ADDS_UP * abs(first + second):
            raise ConfigError(
                f"{name} is no sum over tokens: it gives {first:.4g} and {second:.4g} of two sequences, and {whole:.4g} of both "
                "together; a pipeline divides by the counted targets of the whole batch itself: give the sum (reduction='sum')"
            )


class _Embed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor, start: Start = 0) -> Tensor:
        return self.module(tokens)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, start: Start = 0) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


class _Head(nn.Module):
    """No loss: the module gives it."""

    def __init__(self, module: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        if self.loss is None:
            return self.module(x, targets)  # type: ignore[no-any-return]
        return self.loss(self._logits(x, targets), targets.flatten())

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The loss of each token, [b, s], for evaluations; the sum, where a loss of someone's own gives no more."""
        if self.loss is not summed_cross_entropy:
            own = getattr(self.module, "token_losses", None)
            made: Tensor = own(x, targets) if callable(own) and self.loss is None else self(x, targets)
            return made
        return _cross_entropy(self._logits(x, targets), targets.flatten(), "none").view_as(targets)

    def _logits(self, x: Tensor, targets: Tensor) -> Tensor:
        """[b * s, classes]"""
        logits: Tensor = self.module(x)
        if logits.shape[:2] != targets.shape:
            raise ConfigError(
                f"head ({type(self.module).__name__}) gave logits {list(logits.shape)} for targets {list(targets.shape)}; give "
                "[b, s, classes], or let its forward require (x, targets) and give the loss"
            )
        return logits.flatten(0, 1)


class _WeighedHead(_Head):
    """One whose losses can have weights: our cross entropy of logits, or a module whose forward takes them."""

    def forward(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return super().forward(x, targets)
        if self.loss is None:
            return self.module(x, targets, weights=weights)  # type: ignore[no-any-return]
        return self.token_losses(x, targets, weights).sum()

    def token_losses(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return super().token_losses(x, targets)
        if self.loss is None:  # the module's own of each token, where it has weights too
            own = getattr(self.module, "token_losses", None)
            made: Tensor = (own if callable(own) and takes_weights(own) else self)(x, targets, weights=weights)
            return made
        return super().token_losses(x, targets) * weights


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, classes], targets [n], of which -100 does not count."""
    return _cross_entropy(logits, targets, "sum")


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction=reduction)


def _check_module(name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name}: {type(module).__name__} is no torch.nn.Module; give one")
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ConfigError(
            f"{name}: {type(module).__name__} is on the meta device and has no values; make it on the CPU"
        )


def _requires_targets(head: nn.Module) -> bool:
    """Whether its forward cannot be called with x alone."""
    try:
        signature = inspect.signature(head.forward)
    except (TypeError, ValueError):  # a scripted module tells nothing
        return False
    required = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in required and p.default is p.empty for p in signature.parameters.values()) > 1


def _digest(module: nn.Module) -> int:
    found = 0
    for tensor in (*module.parameters(), *module.buffers()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(values.numpy().data, found)
    return found
