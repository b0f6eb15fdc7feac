"""What a module of somebody else cannot be is refused by name, on every rank, before a step or at its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from others import MLP, SIZES, Listing, Others
from ranks import Ranks, mesh_of
from torch import Tensor, nn

import helixpipe as hp

Change = Callable[[hp.Part, nn.Module], nn.Module]


def setting(kind: str, name: str, made: Callable[[nn.Module], object]) -> Change:
    """Set an attribute of every part of a kind."""

    def change(part: hp.Part, module: nn.Module) -> nn.Module:
        if part.kind == kind:
            setattr(module, name, made(module))
        return module

    return change


def buffer(kind: str, made: Callable[[], Tensor]) -> Change:
    def change(part: hp.Part, module: nn.Module) -> nn.Module:
        if part.kind == kind:
            module.register_buffer("table", made())
        return module

    return change


class Counting(nn.Module):
    """Knows how often it was run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, *inputs: Any) -> Any:
        if self.training:
            self.runs.data.add_(1)  # which torch does not count as a write
        return self.inner(*inputs)


class CountingShape(Listing):
    def parameters(self, part: hp.Part) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"inner.{name}": size for name, size in found.items()} if part.kind == "norm" else found


def counting(part: hp.Part, module: nn.Module) -> nn.Module:
    return Counting(module) if part.kind == "norm" else module


def counting_half(part: hp.Part, module: nn.Module) -> nn.Module:
    return counting(part, module).train(part.layer == 1)


class SameUp(Others):
    """All layers have one matrix, and the shape does not know."""

    up = nn.Parameter(torch.ones(12, 8, dtype=torch.float64))

    def part(self, part: hp.Part) -> nn.Module:
        module = super().part(part)
        if isinstance(module, MLP):
            module.up.weight = self.up
        return module


class OneName(Listing):
    def parameter_name(self, part: hp.Part, name: str) -> str:
        return super().parameter_name(part, "up.weight" if name == "down.weight" else name)


class Complex(Others):
    def part(self, part: hp.Part) -> nn.Module:
        return setting("mlp", "phase", lambda _: nn.Parameter(torch.ones(2, dtype=torch.complex64)))(
            part, super().part(part)
        )


def whole_number(_: nn.Module) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)


def only_on_rank_0(_: nn.Module) -> nn.Parameter:
    return nn.Parameter(torch.ones(8, 8), requires_grad=dist.get_rank() > 0)


def never(kind: str, size: int = 3) -> Change:
    return setting(kind, "never", lambda _: nn.Parameter(torch.ones(size)))


def more(*each: tuple[str, str, tuple[int, ...]], **sizes: Any) -> Listing:
    return Listing(**SIZES | sizes, more=each)


HELIX, AT_HOME = "helix", "1f1b"
CASES: dict[str, tuple[str, Callable[[], Others], str]] = {
    "unlisted": (
        HELIX, lambda: Others(change=never("qkv")),
        r"layers\.\d\.qkv\.never: a parameter of QKV of qkv\.\d that model\.shape does not list, and ranks 0, 1 need it: it "
        r"would not travel; list it in shape\.parameters, or keep the part on one rank",
    ),
    "unlisted at home": (AT_HOME, lambda: Others(change=never("qkv")), "taken"),
    "unlisted attention": (
        HELIX, lambda: Others(change=never("attn")),
        r"layers\.\d\.attn\.never: a parameter of Attention of attn\.\d that model\.shape does not list, and ranks 0, 1 .*",
    ),
    "listed and not there": (
        HELIX, lambda: Others(more(("qkv", "ghost", (3,)))),
        r"layers\.\d\.qkv\.ghost: model\.shape lists it and its weights travel, and QKV of qkv\.\d has no parameter ghost; "
        r"leave it out of shape\.parameters",
    ),
    "listed and not there at home": (AT_HOME, lambda: Others(more(("qkv", "ghost", (3,)))), "taken"),
    "another size": (
        AT_HOME, lambda: Others(more(("mlp", "never", (3,))), never("mlp", 4)),
        r"layers\.\d\.mlp\.never: \[4\] in MLP of mlp\.\d, and model\.shape says \[3\]; make them the same",
    ),
    "whole numbers": (
        HELIX, lambda: Others(more(("qkv", "never", (2,))), setting("qkv", "never", whole_number)),
        r"layers\.\d\.qkv\.never: int8 in QKV of qkv\.\d cannot travel; use floating point, or a buffer",
    ),
    "whole numbers at home": (AT_HOME, lambda: Others(change=setting("qkv", "never", whole_number)), "taken"),
    "complex": (
        AT_HOME, Complex, r"layers\.\d\.mlp\.phase: complex64 in MLP of mlp\.\d cannot train; use floating point, or a buffer",
    ),
    "one parameter, two names": (
        AT_HOME, SameUp,
        r"layers\.\d\.mlp\.up\.weight and layers\.\d\.mlp\.up\.weight are one parameter, and other ranks cannot know; give "
        r"them one name in shape\.parameter_name",
    ),
    "two parameters, one name": (
        AT_HOME, lambda: Others(OneName(**SIZES)),
        r"layers\.\d\.mlp\.up\.weight: \[12, 8\] in mlp\.\d and \[8, 12\] in mlp\.\d; give them two names",
    ),
    "two owners": (
        AT_HOME, lambda: Others(more(("head", "again", (11, 8)), tied=True), setting("head", "again", lambda m: m.output.weight)),
        r"head\.again and embed\.tokens\.weight are one parameter of Head of head\.3, and two ranks own them; list it once",
    ),
    "frozen on one rank": (
        HELIX, lambda: Others(change=lambda part, module: setting("qkv", "k", linear)(part, module)),
        r"layers\.0\.qkv\.k\.weight: frozen in one part or rank and trained in another; let requires_grad be the same in all",
    ),
    "frozen at one end": (
        AT_HOME, lambda: Others(more(tied=True), lambda part, m: m.requires_grad_(False) if part.kind == "embed" else m),
        r"embed\.tokens\.weight: frozen in one part or rank and trained in another; let requires_grad be the same in all",
    ),
    "no such parameter": (
        AT_HOME, lambda: Others(more(frozen=("embed.*", "layer.0.*"))),
        r"model\.frozen: 'layer\.0\.\*' is no parameter; they are embed\.tokens\.weight, head\.norm\.bias, head\.norm\.weight, \.\.\.",
    ),
    "other buffers": (
        HELIX, lambda: Others(change=buffer("qkv", lambda: torch.ones(2 + dist.get_rank()))),
        r"qkv\.\d: not all ranks have its buffer table \[\d\]; hand out the same module whoever asks",
    ),
    "counted by a visitor": (
        HELIX, lambda: Others(CountingShape(**SIZES), counting_half),
        r"layers\.1\.norm\.runs: forwards of norm\.1 change it, and ranks 0, 1 each have one; keep the part on one rank, or its "
        r"module in eval mode",
    ),
    "counted twice": (
        AT_HOME, lambda: Others(CountingShape(**SIZES), counting_half),
        r"layers\.1\.norm\.runs: forwards of norm\.1 change it, and recompute 'selective' would change it twice; use recompute "
        r"'none', or keep its module in eval mode",
    ),
}  # fmt: skip


def linear(_: nn.Module) -> nn.Module:
    made = nn.Linear(8, 8, bias=False)
    made.weight = only_on_rank_0(made)
    return made


def refused(what: str) -> str | None:
    """On a rank: what is said, when a pipeline is made or in its first step."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    family, model, _ = CASES[what]
    options: dict[str, Any] = {"travel": "attention"} if family == HELIX else {}
    schedule = hp.build_schedule(family, ranks=2, layers=3, microbatches=2, **options)
    made = model()
    try:
        pipeline = hp.Pipeline(made, schedule, mesh, dtype=torch.float64, timeout_s=20)
        try:
            pipeline.step(*batch(made.shape, 2, 8))
        finally:
            pipeline.close()
    except hp.ConfigError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("what", CASES)
def test_every_rank_says_why(four_ranks: Ranks, what: str) -> None:
    for said in four_ranks.run(refused, what)[:2]:
        assert re.fullmatch(CASES[what][2], said), said


class Keeping(Others):
    """Hands out the same module objects every time."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        self.made: dict[hp.Part, nn.Module] = {}

    def part(self, part: hp.Part) -> nn.Module:
        if part not in self.made:
            self.made[part] = super().part(part)
        return self.made[part]


def test_modules_go_from_pipeline_to_pipeline_or_are_refused() -> None:
    """In float32 a module's parameters are the masters; in bfloat16 they are copies that a pipeline fills."""
    model, schedule = Keeping(), hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    first = hp.Pipeline(model, schedule)
    loss = first.step(*batch(model.shape, 2, 8))
    gradients = {name: p.grad.clone() for name, p in first.parameters.items() if p.grad is not None}
    second = hp.Pipeline(model, schedule)
    assert second.step(*batch(model.shape, 2, 8)) == loss
    assert all(torch.equal(gradients[name], p.grad) for name, p in second.parameters.items() if p.grad is not None)
    assert model.made[hp.Part("mlp", 0)].up.weight is second.parameters["layers.0.mlp.up.weight"]  # type: ignore[union-attr]
    third = hp.Pipeline(model, schedule, dtype=torch.bfloat16)
    third.step(*batch(model.shape, 2, 8))
    assert len(gradients) == len([p for p in third.parameters.values() if p.grad is not None])
    hp.Pipeline(model, schedule, dtype=torch.bfloat16)
    with pytest.raises(
        hp.ConfigError, match=r"embed.tokens.weight: its values in Embed of embed are with an earlier pipeline; .*"
    ):
        hp.Pipeline(model, schedule)


def test_frozen_is_a_list() -> None:
    with pytest.raises(hp.ConfigError, match=r"model.frozen: 'embed.\*' is one text; give a list of names or patterns"):
        hp.ModelShape(**SIZES, frozen="embed.*")  # type: ignore[arg-type]
    shape = hp.ModelShape(**SIZES, frozen=["embed.*", "layers.[01].*"])  # type: ignore[arg-type]
    assert shape == hp.ModelShape(**SIZES, frozen=("embed.*", "layers.[01].*"))
    assert hash(shape)
    assert not shape.trains("embed.tokens.weight")
    assert not shape.trains("layers.1.mlp.up.weight")
    assert shape.trains("layers.2.mlp.up.weight")
