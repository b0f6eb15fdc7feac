"""Modules of somebody else, frozen, shared, half used: gradients are plain autograd's wherever a stage runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coverings import covering, pairs
from oracle import batch, plain_step
from others import MLP, SIZES, Listing, Others, Plain, equal
from ranks import Ranks, mesh_of
from test_mesh import device_mesh
from torch import Tensor, nn

import helixpipe as hp

LENGTH, MICROBATCHES = 12, 4
SEGMENTS = (7, 5)
Gradients = dict[str, Tensor | None]


# what people do to modules


def frozen(*chosen: str) -> Callable[[hp.Part, nn.Module], nn.Module]:
    """Parts of these kinds, or layers, do not train."""

    def change(part: hp.Part, module: nn.Module) -> nn.Module:
        if part.kind in chosen or (f"layer {part.layer}" in chosen and part.kind != "head"):
            module.requires_grad_(False)
        return module

    return change


class GatedByItself(MLP):
    """One parameter at two places that the shape lists: a SwiGLU of one matrix."""

    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__(shape)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.gate.weight = self.up.weight

    def forward(self, y: Tensor) -> Tensor:
        n = self.norm(y)
        return y + self.down(F.silu(self.gate(n)) * self.up(2 * n))  # type: ignore[no-any-return]


class Twins(MLP):
    """One layer under two names, of which the shape lists the second; and held where torch does not look."""

    def __init__(self, shape: hp.ModelShape) -> None:
        super().__init__(shape)
        self.another = self.up
        self.hidden = [self.down.weight]

    def named_parameters(self, *args: Any, **more: Any) -> Any:
        return reversed(list(super().named_parameters(*args, **more)))

    def forward(self, y: Tensor) -> Tensor:
        n = self.norm(y)
        wide = F.gelu(self.up(n)) + F.gelu(self.another(3 * n))
        return y + self.down(wide) + F.linear(torch.tanh(wide), self.hidden[0])  # type: ignore[no-any-return]


def queries_are_keys(part: hp.Part, module: nn.Module) -> nn.Module:
    if part.kind == "qkv":
        module.q.weight = module.k.weight  # type: ignore[union-attr]
    return module


def mlps(kind: type[MLP]) -> Callable[[hp.Part, nn.Module], nn.Module]:
    shape = hp.ModelShape(**SIZES)
    return lambda part, module: kind(shape) if part.kind == "mlp" else module


def never_used(part: hp.Part, module: nn.Module) -> nn.Module:
    if part.kind in ("qkv", "mlp"):
        module.never = nn.Parameter(torch.ones(3))
    return module


def never_used_mlp(part: hp.Part, module: nn.Module) -> nn.Module:
    """In no shape's list."""
    return never_used(part, module) if part.kind == "mlp" else module


class OneForAll(Listing):
    """Every layer's `up` is one matrix, and `k` that of the layer's neighbour."""

    def parameter_name(self, part: hp.Part, name: str) -> str:
        if name == "up.weight":
            return "up of all.weight"
        if part.kind == "qkv" and name == "k.weight":
            return f"layers.{part.layer // 2}.k.weight"
        return super().parameter_name(part, name)


class Table(nn.Module):
    """A module behind tables: whole numbers, truth values, and two that another precision would change."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("mask", torch.rand(8) < 0.5, persistent=False)
        self.register_buffer("scale", torch.rand(8, dtype=torch.float64))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor, *more: Any) -> Any:
        assert self.scale.dtype == torch.float64
        assert self.order.dtype == torch.int64
        return self.inner((x + self.scale)[..., self.order] * self.mask, *more)


class InTables(Listing):
    def parameters(self, part: hp.Part) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"inner.{name}": size for name, size in found.items()} if part.kind in ("norm", "qkv") else found


def in_tables(part: hp.Part, module: nn.Module) -> nn.Module:
    return Table(module) if part.kind in ("norm", "qkv") else module


def no_residual(part: hp.Part, module: nn.Module) -> nn.Module:
    """Attention is all: proj does not read x."""
    if part.kind == "proj":
        module.forward = lambda o, x: module.o(o)  # type: ignore[assignment, operator, union-attr]
    return module


SIX = SIZES | {"layers": 6}
MODELS: dict[str, Callable[[], Others]] = {
    "frozen layers": lambda: Others(Listing(**SIX), frozen("layer 1", "layer 2")),
    "frozen embedding and head": lambda: Others(Listing(**SIX), frozen("embed", "head")),
    "frozen to the last layer": lambda: Others(Listing(**SIX), frozen("embed", *(f"layer {i}" for i in range(5)))),
    "frozen all but norms": lambda: Others(Listing(**SIX), frozen("embed", "qkv", "proj", "mlp", "head")),
    "gated by itself": lambda: Others(Listing(**SIX | {"mlp": "swiglu"}), mlps(GatedByItself)),
    "twins": lambda: Others(Listing(**SIX), mlps(Twins)),
    "queries are keys": lambda: Others(Listing(**SIX), queries_are_keys),
    "tied table": lambda: Others(Listing(**SIX, tied=True)),
    "tied and frozen table": lambda: Others(Listing(**SIX, tied=True), frozen("embed", "head")),
    "one for all": lambda: Others(OneForAll(**SIX)),
    "never used": lambda: Others(
        Listing(**SIX, more=(("qkv", "never", (3,)), ("mlp", "never", (3,)))), never_used
    ),
    "tables": lambda: Others(InTables(**SIX), in_tables),
    "rare": lambda: Others(Listing(**SIX), never_used_mlp, rare=True),
    "no residual": lambda: Others(Listing(**SIX), no_residual),
}  # fmt: skip
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "1f1b": ("1f1b", {}), "attention travels": ("helix", {"travel": "attention"}), "qkv travels": ("helix", {"travel": "qkv"}),
    "zb_h1": ("zb_h1", {}), "zb_v": ("zb_v", {}), "seq1f1b": ("seq1f1b", {"segments": 2}),
}  # fmt: skip
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Case:
    model: str
    schedule: str
    ranks: int
    recompute: str = "selective"
    mesh: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}{size}" for axis, size in self.mesh) or f"p{self.ranks}"
        return f"{self.model}, {self.schedule}, {mesh}, {self.recompute}"


def rows(model: Others, sequences: int) -> tuple[Tensor, Tensor]:
    """Token 0 is in the last sequence alone, or in none."""
    tokens, targets = batch(model.shape, sequences, LENGTH)
    tokens[tokens == 0] = 1
    if model.rare:
        tokens[-1, -1] = 0
    return tokens, targets


@functools.cache
def expected(model: str, sequences: int = MICROBATCHES) -> tuple[float, Gradients]:
    made = MODELS[model]()
    plain = Plain(made)
    loss = plain.step(*rows(made, sequences))
    return loss, {name: p.grad for name, p in plain.parameters.items()}


def pipeline_of(case: Case, model: Others, mesh: Any) -> hp.Pipeline:
    family, options = SCHEDULES[case.schedule]
    layers = model.shape.layers
    schedule = hp.build_schedule(family, ranks=case.ranks, layers=layers, microbatches=MICROBATCHES, **options)
    return hp.Pipeline(
        model, schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30,
        segment_lengths=SEGMENTS if schedule.segments == 2 else None,
    )  # fmt: skip


def run_case(case: Case) -> tuple[float, Gradients] | None:
    """On a rank of the four: this rank's loss and gradients; None on the ranks the case does not use."""
    mesh = device_mesh(case.mesh) if case.mesh else mesh_of(case.ranks)
    if mesh is None:
        return None
    model = MODELS[case.model]()
    pipeline = pipeline_of(case, model, mesh)
    replicas = dict(case.mesh).get("dp", 1)
    loss = pipeline.step(*rows(model, MICROBATCHES * replicas))
    assert pipeline._ledger.bytes == 0
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}


def holds(ranks: Ranks, case: Case) -> None:
    replicas = dict(case.mesh).get("dp", 1)
    loss, gradients = expected(case.model, MICROBATCHES * replicas)
    found: Gradients = {}
    for result in filter(None, ranks.run(run_case, case)):
        assert abs(result[0] - loss) < 1e-12
        for name, gradient in result[1].items():
            if name in found and gradient is not None:
                assert torch.equal(found[name], gradient), f"{name} differs between replicas"
            found[name] = gradient
    equal(gradients, found)


def product() -> Iterator[Case]:
    for at in itertools.product(MODELS, SCHEDULES, (1, 2, 3), RECOMPUTE):
        yield Case(*at)


def meetings(case: Case) -> list[Hashable]:
    """Every two choices, and every model under every schedule on several ranks.

    Token 0 is in one sequence: with one rank a rare parameter is used, and what no shape lists stays at home.
    """
    every_two = pairs(case.model, case.schedule, case.ranks, case.recompute)
    return [*every_two, ("several", case.model, case.schedule)] if case.ranks > 1 else every_two


@pytest.mark.parametrize("case", covering(product(), meetings), ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_full_product(four_ranks: Ranks, model: str) -> None:
    """Every schedule on every number of ranks under every policy: `make test-full`."""
    for case in product():
        if case.model == model:
            holds(four_ranks, case)


# several replicas


REPLICAS = ((("pp", 2), ("dp", 2)), (("dp", 4),), (("pp", 2), ("cp", 2)))


def replicated() -> list[Case]:
    models = ("rare", "frozen layers", "tied and frozen table", "never used")
    asked = itertools.product(models, REPLICAS, ("1f1b", "attention travels"), ("none", "selective"))
    return [
        Case(model, schedule, dict(mesh).get("pp", 1), recompute, mesh) for model, mesh, schedule, recompute in asked
    ]


def of_replicas(case: Case) -> list[Hashable]:
    """Every model under every schedule on every mesh; every two of the rest."""
    return [
        (case.model, case.schedule, case.mesh),
        *pairs(case.model, case.schedule, case.mesh, case.recompute),
    ]


@pytest.mark.parametrize("case", covering(replicated(), of_replicas), ids=str)
def test_replicas_reduce_the_same_whatever_each_used(four_ranks: Ranks, case: Case) -> None:
    """Guards against sums of other parameters' gradients where a replica did not use one."""
    holds(four_ranks, case)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_replicas_full_product(four_ranks: Ranks) -> None:
    """Every policy: `make test-full`."""
    for case in replicated():
        holds(four_ranks, case)


# frozen by the shape


FROZEN: list[dict[str, Any]] = [
    {"frozen": ("embed.*", "layers.[02].*"), "tied": False},
    {"frozen": ("embed.*", "layers.0.*", "layers.1.*", "layers.2.norm.*", "layers.2.qkv.*", "layers.2.proj.*")},
    {"frozen": ("*.norm.*", "*.q.weight", "*.bias"), "bias": True, "qkv_bias": True, "tied": True},
    {"frozen": ("*[!s].weight",), "qk_norm": True, "norm": "layer"},
]
DECODER: dict[str, Any] = {"layers": 3, "hidden": 16, "heads": 4, "ffn": 24, "vocabulary": 19}


def run_decoder(case: Case, which: dict[str, Any], chunk: int) -> tuple[float, Gradients] | None:
    mesh = device_mesh(case.mesh) if case.mesh else mesh_of(case.ranks)
    if mesh is None:
        return None
    model = hp.Decoder(hp.ModelShape(**DECODER | which), mlp_chunk=chunk, head_chunk=chunk)
    pipeline = pipeline_of(case, model, mesh)  # type: ignore[arg-type]
    loss = pipeline.step(*batch(model.shape, 2 * MICROBATCHES, LENGTH))
    assert pipeline._ledger.bytes == 0
    norm = pipeline.clip_gradients(1e-3)
    assert norm > 1e-3
    pipeline.close()
    cuts = set(pipeline._tensor.cuts) if pipeline._tensor else set()
    return loss, {name: p.grad for name, p in pipeline.parameters.items() if name not in cuts}


OF_DECODERS = ("1f1b", "qkv travels", "zb_h1", "seq1f1b")
WAYS = ((1, "none"), (2, "none"), (2, "selective"), (3, "full"))
"""Ranks and policy."""


@pytest.mark.parametrize("which", range(len(FROZEN)))
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("schedule", OF_DECODERS)
def test_a_decoder_is_frozen_by_its_shape(four_ranks: Ranks, which: int, chunk: int, schedule: str) -> None:
    """Guards, too, against chunked parts that lose their gradients where all before them is frozen.

    Ways in turn: whatever is frozen, in chunks or not, meets every way, and so does every schedule, in chunks or not.
    """
    way = WAYS[(which + chunk + OF_DECODERS.index(schedule)) % 4]
    decoder_holds(four_ranks, Case("", schedule, *way), which, chunk)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_frozen_decoder_full_product(four_ranks: Ranks) -> None:
    """Everything every way: `make test-full`."""
    for schedule, way, which, chunk in itertools.product(OF_DECODERS, WAYS, range(len(FROZEN)), (0, 5)):
        decoder_holds(four_ranks, Case("", schedule, *way), which, chunk)


@pytest.mark.parametrize("mesh", [(("pp", 2), ("tp", 2)), (("cp", 2), ("tp", 2)), (("dp", 2), ("cp", 2))])
def test_a_frozen_decoder_on_a_mesh(four_ranks: Ranks, mesh: tuple[tuple[str, int], ...]) -> None:
    for which in (0, 2):
        decoder_holds(four_ranks, Case("", "1f1b", dict(mesh).get("pp", 1), "selective", mesh), which, 0)


@functools.cache
def decoder(which: int) -> tuple[hp.ModelShape, float, dict[str, Tensor]]:
    """Its shape, and plain autograd's loss and gradients."""
    shape = hp.ModelShape(**DECODER | FROZEN[which])
    return shape, *plain_step(shape, *batch(shape, 2 * MICROBATCHES, LENGTH))


def decoder_holds(four_ranks: Ranks, case: Case, which: int, chunk: int) -> None:
    """Clipped to a norm of 1e-3, of trained parameters alone."""
    shape, loss, gradients = decoder(which)
    trained = {name: g for name, g in gradients.items() if shape.trains(name)}
    assert 0 < len(trained) < len(gradients)
    norm = float(torch.nn.utils.get_total_norm(trained.values()))
    found: Gradients = {}
    for result in filter(None, four_ranks.run(run_decoder, case, FROZEN[which], chunk)):
        assert abs(result[0] - loss) < 1e-12
        found |= result[1]
    wanted = {name: g * 1e-3 / (norm + 1e-6) if name in trained else None for name, g in gradients.items()}
    equal({name: wanted[name] for name in found}, found)


# several steps


def run_steps(case: Case) -> dict[str, Tensor] | None:
    """On a rank: its parameters after three steps of an optimizer that knows nothing of pipelines."""
    mesh = device_mesh(case.mesh) if case.mesh else mesh_of(case.ranks)
    if mesh is None:
        return None
    model = MODELS[case.model]()
    pipeline = pipeline_of(case, model, mesh)
    optimizer = torch.optim.AdamW(pipeline.parameters.values(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        model.rare = step != 1  # which then nobody uses
        pipeline.zero_gradients()
        pipeline.step(*rows(model, MICROBATCHES * dict(case.mesh).get("dp", 1)))
        optimizer.step()
    pipeline.close()
    return {name: p.detach() for name, p in pipeline.parameters.items()}


def moving() -> list[Case]:
    models = ("rare", "never used", "frozen layers", "tied and frozen table", "one for all")
    asked = itertools.product(models, ("1f1b", "qkv travels", "attention travels"), ((), (("pp", 2), ("dp", 2))))
    return [Case(model, schedule, 2, mesh=mesh) for model, schedule, mesh in asked]


@pytest.mark.parametrize("case", covering(moving(), lambda case: pairs(case.model, case.schedule, case.mesh)), ids=str)
def test_an_optimizer_moves_what_plain_training_moves(four_ranks: Ranks, case: Case) -> None:
    """AdamW decays a parameter whose gradient is zero, and leaves alone one that has none."""
    moves(four_ranks, case)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_an_optimizer_full_product(four_ranks: Ranks) -> None:
    """With replicas and without: `make test-full`."""
    for case in moving():
        moves(four_ranks, case)


def moves(four_ranks: Ranks, case: Case) -> None:
    made = MODELS[case.model]()
    plain = Plain(made)
    optimizer = torch.optim.AdamW(plain.parameters.values(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        made.rare = step != 1
        optimizer.zero_grad()
        plain.step(*rows(made, MICROBATCHES * dict(case.mesh).get("dp", 1)))
        optimizer.step()
    found: dict[str, Tensor] = {}
    for result in filter(None, four_ranks.run(run_steps, case)):
        found |= result
    equal({name: p.detach() for name, p in plain.parameters.items()}, found)  # type: ignore[arg-type]
