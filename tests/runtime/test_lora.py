"""LoRA: loss and gradients equal plain autograd's of W + scale * B A, whatever runs it; what is frozen stays as it is."""

from __future__ import annotations

import functools
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_logits
from ranks import Ranks, mesh_of
from test_memory import most
from test_mesh import device_mesh
from test_transformers import EXACT, Named, Truth, equal
from torch import Tensor
from values import Given, initial_values

import helixpipe as hp
from helixpipe.errors import ConfigError
from helixpipe.parts.lora import Lora
from helixpipe.parts.work import Keeping
from helixpipe.predict.memory import held_bytes
from helixpipe.predict.standing import owned_and_visiting, standing_bytes

ALL = ("q", "k", "v", "o", "gate", "up", "down")
LENGTH = 12
LENGTHS = {1: None, 3: (6, 1, 5)}
SIZES: dict[str, Any] = {"hidden": 12, "heads": 4, "head_dim": 6, "kv_heads": 2, "ffn": 20, "vocabulary": 19}
SHAPES = {
    "llama": SIZES | {"lora": Lora(3, 6.0, ALL)},
    "attention": SIZES | {"lora": Lora(2, 5.0, ("q", "v")), "norms": "both", "qk_norm": True, "tied": True},
    "mlp": SIZES
    | {"lora": Lora(2, 0.0, ("o", "up", "down"), rslora=True), "mlp": "gelu", "bias": True, "norm": "layer"},
}


def shape_of(name: str, layers: int) -> hp.ModelShape:
    return hp.ModelShape(layers=layers, **SHAPES[name])


def values_of(shape: hp.ModelShape) -> Named:
    """No B is 0."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64) if "lora_b" in name else value
        for name, value in initial_values(shape).items()
    }


def merged(w: Named, scale: float) -> Named:
    """As one matrix, by hand."""
    found = {name: value for name, value in w.items() if "lora" not in name}
    for name in [name for name in w if name.endswith("lora_a.weight")]:
        layer = name.removesuffix(".lora_a.weight")
        found[f"{layer}.weight"] = w[f"{layer}.weight"] + scale * w[f"{layer}.lora_b.weight"] @ w[name]
    return found


@functools.cache
def truth(name: str, layers: int) -> Truth:
    shape = shape_of(name, layers)
    values = values_of(shape)
    w = {each: value.double().requires_grad_("lora" in each) for each, value in values.items()}
    tokens, targets = batch(shape, 4, LENGTH)
    assert shape.lora is not None
    scale = shape.lora.alpha / (shape.lora.rank**0.5 if shape.lora.rslora else shape.lora.rank)
    logits = plain_logits(replace(shape, lora=None), merged(w, scale), tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    gradients = {each: value.grad for each, value in w.items() if value.grad is not None}
    return Truth(float(loss.detach()), values, gradients)


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    mesh: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    recompute: str = "selective"
    chunk: int = 0

    def __str__(self) -> str:
        words = [self.name, self.family, *(f"{axis}{size}" for axis, size in self.mesh.items()), self.recompute]
        return "-".join([*words, f"chunk{self.chunk}", *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def layers(self) -> int:
        return 2 * self.mesh["pp"]


Found = tuple[float, Named, dict[str, int], int]


def run_case(case: Case, values: bytes) -> Found | None:
    """On a rank of the four; None where the case has no use."""
    whole = "tp" in case.mesh or "cp" in case.mesh
    mesh = device_mesh(tuple(case.mesh.items())) if whole else mesh_of(case.mesh["pp"])
    if mesh is None:
        return None
    schedule = hp.build_schedule(case.family, ranks=case.mesh["pp"], layers=case.layers, microbatches=4, **case.options)
    shape = shape_of(case.name, case.layers)
    pipeline = hp.Pipeline(
        Given(shape, pickle.loads(values), case.chunk), schedule, mesh, dtype=torch.float64, recompute=case.recompute,
        timeout_s=30, segment_lengths=LENGTHS[schedule.segments],
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in pipeline.parameters.items()}
    loss = pipeline.step(*batch(shape, 4, LENGTH))
    assert abs(pipeline.evaluate(*batch(shape, 4, LENGTH)) - loss) < EXACT[0]
    assert pipeline._ledger.bytes == 0
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    optimizer = torch.optim.SGD([p for p in pipeline.parameters.values() if p.requires_grad], lr=1.0)
    optimizer.step()
    for name, p in pipeline.parameters.items():
        assert torch.equal(p, before[name]) != ("lora" in name), name
    pipeline.close()
    return loss, gradients, pipeline._tensor.cuts if pipeline._tensor else {}, pipeline.mesh.here.tp


CASES = [
    Case("llama", "1f1b", {"pp": 1}, recompute="none"),
    Case("llama", "1f1b", {"pp": 2}, recompute="full", chunk=5),
    Case("mlp", "1f1b", {"pp": 2}, recompute="none"),
    Case("attention", "zb_v", {"pp": 2}, recompute="none"),
    Case("llama", "zb_v", {"pp": 2}, recompute="full"),
    Case("mlp", "zb_v", {"pp": 1}, chunk=5),
    Case("mlp", "seq1f1b", {"pp": 2}, {"segments": 3}),
    Case("llama", "seq1f1b_zb", {"pp": 2}, {"segments": 3}, "none"),
    Case("attention", "helix", {"pp": 2}, {"travel": "none"}),
    Case("mlp", "helix", {"pp": 2}, {"travel": "none"}, "full"),
    Case("llama", "helix", {"pp": 2}, {"travel": "qkv"}, chunk=5),
    Case("attention", "helix", {"pp": 2}, {"travel": "qkv", "folds": 1}, "none"),
    Case("llama", "helix", {"pp": 2}, {"travel": "attention"}),
    Case("attention", "helix", {"pp": 2}, {"travel": "attention"}, "full"),
    Case("mlp", "helix", {"pp": 1}, {"travel": "attention"}, "none"),
]
MESHES = [
    Case("llama", "1f1b", {"pp": 2, "tp": 2}, recompute="none"),
    Case("llama", "helix", {"pp": 2, "tp": 2}, {"travel": "attention"}, "full", 6),
    Case("mlp", "zb_v", {"pp": 2, "tp": 2}),
    Case("attention", "1f1b", {"pp": 2, "cp": 2}),
    Case("llama", "1f1b", {"pp": 1, "cp": 2, "tp": 2}),
]


@pytest.mark.parametrize("case", [*CASES, *MESHES], ids=str)
def test_pipelines_equal_plain_autograd(four_ranks: Ranks, case: Case) -> None:
    expected = truth(case.name, case.layers)
    pieces: dict[str, dict[int, Tensor]] = {}
    cuts: dict[str, int] = {}
    results = [each for each in four_ranks.run(run_case, case, pickle.dumps(expected.values)) if each is not None]
    for _, gradients, cut, at in results:
        cuts |= cut
        for name, gradient in gradients.items():
            pieces.setdefault(name, {})[at] = gradient
    found = {
        name: torch.cat([each[at] for at in sorted(each)], cuts[name]) if name in cuts else each[0]
        for name, each in pieces.items()
    }
    for loss, *_ in results:
        equal(expected, loss, found)


def test_a_run_begins_as_its_model() -> None:
    """A is torch's (and PEFT's) for a linear layer, B is 0; what else there is, is as without."""
    shape = hp.ModelShape(layers=1, hidden=64, heads=4, ffn=256, vocabulary=19, lora=Lora(16, targets=ALL))
    values, without = initial_values(shape), initial_values(replace(shape, lora=None))
    assert all(torch.equal(values[name], value) for name, value in without.items())
    adapters = {name: value for name, value in values.items() if name not in without}
    assert len(adapters) == 2 * len(ALL)
    for name, value in adapters.items():
        if "lora_b" in name:
            assert not value.any()
            continue
        theirs = torch.nn.Linear(value.shape[1], value.shape[0], bias=False).weight
        torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
        bound = value.shape[1] ** -0.5
        assert 0.95 * bound < value.abs().max() <= bound
        assert float(value.std()) == pytest.approx(float(theirs.detach().std()), rel=0.1)
    first = [value for name, value in adapters.items() if name.endswith(("q.lora_a.weight", "k.lora_a.weight"))]
    assert not torch.equal(*first)


def counts(shape: hp.ModelShape) -> tuple[int, int]:
    sizes = shape.parameter_elements(shape.chain())
    return sum(sizes.values()), sum(size for name, size in sizes.items() if shape.trains(name))


def test_costs_by_hand() -> None:
    """h=12, q 24, k and v 12, rank 2 on q and v: matrices that are not trained have no weight gradient."""
    plain = hp.ModelShape(layers=1, **SIZES)
    shape = replace(plain, lora=Lora(2, targets=("q", "v")))
    adapters = 2 * (12 + 24) + 2 * (12 + 12)
    assert counts(shape) == (counts(plain)[0] + adapters, adapters)
    b = hp.Batch(1, (10,))
    qkv, mlp, head = (hp.Part(kind, layer) for kind, layer in (("qkv", 0), ("mlp", 0), ("head", 1)))
    assert shape.forward_flops(qkv, b, 0) == plain.forward_flops(qkv, b, 0) + 2 * 10 * adapters
    assert shape.weight_flops(qkv, b, 0) == 2 * 10 * adapters
    assert shape.backward_flops(qkv, b, 0) == shape.forward_flops(qkv, b, 0) + 2 * 10 * adapters
    for part in (mlp, head):
        assert shape.weight_flops(part, b, 0) == 0
        assert shape.backward_flops(part, b, 0) == plain.forward_flops(part, b, 0)
    schedule = hp.build_schedule("1f1b", ranks=1, layers=1, microbatches=1)
    (stands,) = standing_bytes(schedule, shape, Keeping(element_bytes=2))
    assert stands.gradients_bytes == 4 * adapters
    assert stands.optimizer_bytes == 8 * adapters
    assert stands.weights_bytes == 2 * counts(plain)[0] + 6 * adapters


@dataclass(frozen=True)
class Bytes:
    family: str
    options: dict[str, Any]
    recompute: str
    chunk: int
    lora: Lora
    fields: dict[str, Any]

    @property
    def shape(self) -> hp.ModelShape:
        return hp.ModelShape(layers=4, hidden=64, heads=4, ffn=256, vocabulary=64, lora=self.lora, **self.fields)

    @property
    def schedule(self) -> hp.Schedule:
        return hp.build_schedule(self.family, ranks=2, layers=4, microbatches=4, **self.options)


def measured(case: Bytes) -> hp.Timeline | None:
    mesh = mesh_of(2)
    if mesh is None:
        return None
    model = hp.Decoder(case.shape, mlp_chunk=case.chunk, head_chunk=case.chunk)
    pipeline = hp.Pipeline(model, case.schedule, mesh, recompute=case.recompute, timeout_s=30)
    pipeline.step(*batch(case.shape, 4, 64))
    pipeline.close()
    return pipeline.timeline()


BYTES = [
    Bytes(family, options, recompute, chunk, lora, fields)
    for i, (family, options) in enumerate([("1f1b", {}), ("zb_h1", {}), ("helix", {"travel": "attention"})])
    for j, (lora, fields) in enumerate(
        [(Lora(16, targets=ALL), {}), (Lora(16, targets=("q", "v")), {}), (Lora(16, targets=("o", "down")), {"mlp": "gelu"})]
    )
    for recompute, chunk in (("none", 0), (("full", "selective")[(i + j) % 2], 16 * (i % 2)))
]  # fmt: skip


@pytest.mark.parametrize("case", BYTES, ids=lambda c: f"{c.family}-{c.recompute}-{c.chunk}-{'-'.join(c.lora.targets)}")
def test_bytes_kept_equal_the_formula(four_ranks: Ranks, case: Bytes) -> None:
    """Within 5%, as of models without (`test_memory`); an adapter of 16 beside 64 is more than that."""
    timeline = four_ranks.run(measured, case)[0]
    program = hp.lower(case.schedule, case.shape, hp.Batch(1, (64,)))
    _, visiting = owned_and_visiting(case.schedule, case.shape)
    for rank, expected in enumerate(held_bytes(program, Keeping(case.recompute, 4, case.chunk, case.chunk))):
        held = [point.kept_bytes for point in timeline.memory[rank][1::2]]
        ended = [each.left_bytes for each in expected]
        # no message says that frozen weights which visit are not needed any more: they go at the step's end
        assert held[-1] == 4 * sum(size for name, size in visiting[rank].items() if not case.shape.trains(name))
        assert max(held) == pytest.approx(max(ended), rel=0.02)
        assert held == pytest.approx(ended, abs=0.02 * max(ended))
        high = max(each.kept_bytes + each.workspace_bytes for each in expected)
        assert most(timeline, rank) == pytest.approx(high, rel=0.05)


def test_weights_of_adapters_travel_and_only_their_gradients_come_home() -> None:
    shape = hp.ModelShape(layers=4, **(SIZES | {"lora": Lora(2, targets=("q", "o", "up"))}))
    schedule = hp.build_schedule("helix", ranks=2, layers=4, microbatches=4, travel="attention")
    messages = hp.lower(schedule, shape, hp.Batch(1, (8,))).messages
    there = {name for m in messages if m.kind == "weights" for name in m.names}
    home = {name for m in messages if m.kind == "weight_gradients" for name in m.names}
    assert {name for name in there if "lora" in name} == home
    assert {name.split(".", 2)[2] for name in home} == {
        f"{layer}.lora_{which}.weight" for layer in ("qkv.q", "proj.o") for which in "ab"
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "train.lora.rank: 0; give at least 1"),
        ({"rank": 2, "targets": ("query",)},
         "train.lora.targets: 'query' is no linear layer; known: q, k, v, o, gate, up, down"),
        ({"rank": 2, "targets": ()}, "train.lora.targets: none; give some of q, k, v, o, gate, up, down"),
        ({"rank": 2, "alpha": -1.0}, "train.lora.alpha: -1; give more than 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Lora(**fields)
    assert str(error.value) == said


def test_a_model_without_a_gate_has_none_to_adapt() -> None:
    with pytest.raises(ConfigError) as error:
        hp.ModelShape(layers=1, **(SIZES | {"mlp": "gelu", "lora": Lora(2, targets=("gate",))}))
    assert str(error.value) == "train.lora.targets: 'gate', and this model's MLP has none; known: q, k, v, o, up, down"
