"""Models of somebody else: every part in plain torch, with what people do to modules; and the plain step they must equal.

The oracle runs the same modules one after another, one micro-batch after another, with attention of its own. Of the library
it reads names and the chain of parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import plain_attention
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.model.attn import Attention
from helixpipe.parts.part import chain

SIZES: dict[str, Any] = {
    "layers": 3, "hidden": 8, "heads": 2, "ffn": 12, "vocabulary": 11, "norm": "layer", "mlp": "gelu",
}  # fmt: skip
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Listing(hp.ModelShape):
    """A shape that lists more parameters: (kind of part, name in it, size)."""

    more: tuple[tuple[str, str, Sizes], ...] = ()

    def parameters(self, part: hp.Part) -> dict[str, Sizes]:
        return super().parameters(part) | {name: size for kind, name, size in self.more if kind == part.kind}


class Embed(nn.Module):
    """One token in eleven has a vector of its own, which batches without it do not use."""

    def __init__(self, shape: hp.ModelShape, rare: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.rare = nn.Parameter(torch.randn(shape.hidden)) if rare else None

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.rare is not None and (tokens == 0).any():
            x = x + self.rare * (tokens == 0).unsqueeze(-1)
        return x


class QKV(nn.Module):
    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(3))

    def forward(self, n: Tensor, start: int) -> tuple[Tensor, ...]:
        return tuple(each(n).unflatten(-1, (2, -1)) for each in (self.q, self.k, self.v))


class Proj(nn.Module):
    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__()
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        return x + self.o(o)  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.down(F.gelu(self.up(self.norm(y))))  # type: ignore[no-any-return]


class Head(nn.Module):
    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden)
        self.output = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.output(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


class Others:
    """`change` is called with every part and its module, and gives the module to use."""

    def __init__(
        self,
        shape: hp.ModelShape | None = None,
        change: Callable[[hp.Part, nn.Module], nn.Module] = lambda part, module: module,
        rare: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.shape = shape or Listing(**SIZES)
        self.change, self.rare, self.dtype = change, rare, dtype

    def part(self, part: hp.Part) -> nn.Module:
        """The same values whoever asks."""
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(str(part).encode()))
            return self.change(part, self._made(part)).to(self.dtype)

    def _made(self, part: hp.Part) -> nn.Module:
        match part.kind:
            case "embed":
                return Embed(self.shape, self.rare)
            case "norm":
                return nn.LayerNorm(self.shape.hidden)
            case "attn":
                return Attention(self.shape.causal)
            case "qkv":
                return QKV(self.shape)
            case "proj":
                return Proj(self.shape)
            case "mlp":
                return MLP(self.shape)
        return Head(self.shape)


class Plain:
    """A model on one process, without the library: its modules called one after another."""

    def __init__(self, model: Others) -> None:
        self.shape, self.parts = model.shape, {part: model.part(part) for part in chain(model.shape.layers)}
        self.parameters: dict[str, nn.Parameter] = {}
        for part, module in self.parts.items():
            for place, parameter in list(module.named_parameters()):
                name = model.shape.parameter_name(part, place)
                if name in self.parameters:  # tied by its name
                    *path, leaf = place.split(".")
                    setattr(module.get_submodule(".".join(path)), leaf, self.parameters[name])
                else:
                    self.parameters[name] = parameter

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """The mean loss of a batch whose micro-batches are its sequences; gradients collect."""
        total = 0.0
        for row, wanted in zip(tokens.split(1), targets.split(1), strict=True):
            loss = self._loss(row, wanted) / (targets != -100).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        values: dict[str, Any] = {}
        for part, module in self.parts.items():
            match part.kind:
                case "embed":
                    values["x"] = module(tokens, 0)
                case "qkv":
                    values["q"], values["k"], values["v"] = module(values["n"], 0)
                case "attn":
                    q, k, v = (values[each].transpose(1, 2) for each in "qkv")
                    values["o"] = plain_attention(q, k, v, self.shape.causal)[0].transpose(1, 2).flatten(2)
                case "head":
                    return module(values["x"], targets)  # type: ignore[no-any-return]
                case _:
                    made = module(*(values[value.name] for value in part.reads))
                    values[part.makes[0].name] = made
        raise AssertionError


def equal(expected: dict[str, Tensor | None], found: dict[str, Tensor | None]) -> None:
    """Gradients or values, by name: the same ones are None, the others equal to 1e-9."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        got = found[name]
        assert (got is None) == (wanted is None), f"{name}: {got} where plain autograd has {wanted}"
        if wanted is not None and got is not None:
            error = (got - wanted).norm() / wanted.norm().clamp_min(1e-30)
            assert error < 1e-9, f"{name}: {error:.1e}"
