"""Weights of targets: losses and gradients are those of sum(weight * cross entropy) / counted, written out in torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_logits
from others import Others
from ranks import Ranks
from test_mesh import Found, assembled, device_mesh, sized
from torch import Tensor, nn
from values import initial_values

import helixpipe as hp
from helixpipe.model.cross_entropy import cross_entropy
from helixpipe.runtime.losses import Losses

LENGTH = 12
SHAPES: list[dict[str, Any]] = [
    {"tied": True, "kv_heads": 2},
    {"causal": False, "head_softcap": 0.3, "head_transform": True, "bias": True},
]
TAKES_TARGETS_ALONE = (
    "weights: the module of head.3 takes targets alone; let its forward be (x, targets, weights=None), and give the sum of each "
    "loss times its weight"
)


def shape_of(number: int) -> hp.ModelShape:
    return hp.ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19, **SHAPES[number])


def weighed(shape: hp.ModelShape, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and weights: some negative, some 0, of ignored targets as well."""
    weights = torch.randn(sequences, LENGTH, generator=torch.Generator().manual_seed(3)) * 3
    weights[:, 5] = 0
    return *batch(shape, sequences, LENGTH), weights


def mask_of(targets: Tensor) -> Tensor:
    """All that a loss is to be divided by: more than the targets, and not all."""
    mask = targets != -100
    mask[:, -1] = True
    mask[:, LENGTH // 3] = torch.arange(len(targets)) % 2 == 0
    return mask


@dataclass(frozen=True)
class Truth:
    loss: float
    """Without the z-loss, divided by the targets that count."""
    by_position: list[float]
    gradients: dict[str, Tensor]


@functools.cache
def truth(number: int, sequences: int, z: float) -> Truth:
    shape = shape_of(number)
    tokens, targets, weights = weighed(shape, sequences)
    weights = weights.double()
    w = {name: value.double().requires_grad_() for name, value in initial_values(shape).items()}
    logits = plain_logits(shape, w, tokens)
    counted = targets != -100
    each = F.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none") * weights
    total = (each + z * weights * counted * logits.exp().sum(-1).log().square()).sum() / counted.sum()
    gradients = torch.autograd.grad(total, list(w.values()))
    sums = [float(each[:, first:stop].sum().detach()) for first, stop in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 12))]
    loss = float((each.sum() / counted.sum()).detach())
    return Truth(loss, sums, dict(zip(w, gradients, strict=True)))


@dataclass(frozen=True)
class Case:
    family: str
    mesh: tuple[tuple[str, int], ...] = ()
    shape: int = 0
    chunk: int = 0
    z: float = 0.0
    recompute: str = "selective"
    microbatches: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        return self.microbatches * dict(self.mesh).get("dp", 1)

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.mesh) or "alone"
        return f"{mesh}-{self.family}-shape{self.shape}-chunk{self.chunk}-z{self.z}-{self.recompute}"

    def pipeline(self) -> hp.Pipeline:
        ranks = dict(self.mesh).get("pp", 1)
        schedule = hp.build_schedule(self.family, ranks=ranks, layers=2, microbatches=self.microbatches, **self.options)
        return hp.Pipeline(
            hp.Decoder(shape_of(self.shape), head_chunk=self.chunk, z_loss=self.z), schedule,
            device_mesh(self.mesh) if self.mesh else None, dtype=torch.float64, recompute=self.recompute,
            segment_lengths=(4, 8) if schedule.segments == 2 else None, timeout_s=30,
        )  # fmt: skip


def run_case(case: Case) -> tuple[Found, Losses, float, float]:
    """On a rank."""
    pipeline = case.pipeline()
    tokens, targets, weights = weighed(shape_of(case.shape), case.sequences)
    loss = pipeline.step(tokens, targets, weights=weights)
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    evaluated = pipeline.evaluate(tokens, targets, weights=weights)
    more = pipeline.evaluate(tokens, targets, 100, weights), pipeline.step(tokens, targets, mask_of(targets), weights)
    losses = pipeline.losses(tokens, targets, mask_of(targets), weights)
    pipeline.close()
    return Found(pipeline.mesh.here, loss, evaluated, 0.0, gradients, cuts), losses, *more


def holds(case: Case, results: list[tuple[Found, Losses, float, float]]) -> None:
    expected = truth(case.shape, case.sequences, case.z)
    _, targets, _ = weighed(shape_of(case.shape), case.sequences)
    counted, mask = int((targets != -100).sum()), mask_of(targets)
    assert int(mask.sum()) > counted
    for found, losses, by_number, by_mask in results:
        assert abs(found.loss - expected.loss) < 1e-12
        assert abs(found.evaluated - expected.loss) < 1e-12
        assert by_number == pytest.approx(expected.loss * counted / 100, abs=1e-12)
        assert by_mask == pytest.approx(expected.loss * counted / int(mask.sum()), abs=1e-12)
        assert losses.total == pytest.approx(expected.loss * counted, abs=1e-11)
        assert losses.counted == int(mask.sum())
        assert [b.total for b in losses.by_position] == pytest.approx(expected.by_position, abs=1e-11)
        assert [b.counted for b in losses.by_position] == [
            int(mask[:, b.first : b.stop].sum()) for b in losses.by_position
        ]
    gradients = assembled([found for found, *_ in results])
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{name}: {error:.1e}"


ALONE = [
    Case("1f1b"),
    Case("1f1b", shape=1, chunk=5, recompute="none"),
    Case("1f1b", z=0.05, chunk=5, recompute="full"),
    Case("1f1b", z=0.05, shape=1),
    Case("helix", shape=1, microbatches=4, options={"folds": 2, "travel": "attention"}),
    Case("seq1f1b", chunk=3, options={"segments": 2}),
    Case("zb_h1", z=0.05),
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_on_one_rank(case: Case) -> None:
    holds(case, [run_case(case)])


FOUR = [
    Case("1f1b", sized(pp=2, dp=2)),
    Case("helix", sized(pp=2, dp=2), shape=1, chunk=5, z=0.05, microbatches=4, options={"folds": 2}),
    Case("helix", sized(pp=2, cp=2), shape=1, microbatches=4, options={"folds": 2, "travel": "qkv"}),
    Case("seq1f1b", sized(pp=2, cp=2), chunk=4, recompute="none", options={"segments": 2}),
    Case("1f1b", sized(pp=2, tp=2), z=0.05, recompute="full"),
    Case("seq1f1b", sized(dp=2, tp=2), chunk=3, options={"segments": 2}),
]


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_on_four_ranks(four_ranks: Ranks, case: Case) -> None:
    holds(case, four_ranks.run(run_case, case))


def test_of_half_precision_and_of_nothing_that_counts() -> None:
    """Weights are float32, logits wider than the model: a loss in float32, and gradients where nothing is counted are 0."""
    targets = torch.tensor([3, -100, 8, 0])
    weights = torch.tensor([2.0, 7.0, 0.0, -1.0])
    for chosen in (targets, torch.full_like(targets, -100)):
        logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        plain = logits.detach().clone().requires_grad_()
        loss = cross_entropy(logits, chosen, weights=weights)
        expected = (F.cross_entropy(plain, chosen, ignore_index=-100, reduction="none") * weights).sum()
        loss.backward()
        expected.backward()
        assert loss.dtype is torch.float32
        assert torch.allclose(loss.detach(), expected.detach())
        assert logits.grad is not None
        assert plain.grad is not None
        assert torch.allclose(logits.grad, plain.grad, atol=1e-7)


def test_weights_of_one_are_none() -> None:
    pipeline = Case("1f1b", chunk=5).pipeline()
    tokens, targets, weights = weighed(shape_of(0), 2)
    plain = pipeline.step(tokens, targets)
    assert pipeline.step(tokens, targets, weights=torch.ones_like(weights)) == pytest.approx(plain, abs=1e-14)
    assert pipeline.losses(tokens, targets, weights=torch.ones_like(weights)).mean == pytest.approx(plain, abs=1e-12)
    pipeline.close()


class Own(nn.Module):
    """A head that gives the loss itself, and knows of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(8, 19)

    def forward(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        each = F.cross_entropy(self.output(x).mT, targets, ignore_index=-100, reduction="none")
        return (each if weights is None else each * weights).sum()


class Telling(Own):
    """Its losses of tokens know nothing of them: a sum is what it gives then."""

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("asked without weights")


@pytest.mark.parametrize("chosen", ["logits", "own", "telling"])
def test_plain_modules_weigh_where_they_can(chosen: str) -> None:
    torch.manual_seed(3)
    head = {"own": Own, "telling": Telling}.get(chosen, lambda: nn.Linear(8, 19))()
    embed, layers = nn.Embedding(19, 8), [nn.Linear(8, 8)]
    pipeline = pipeline_of(hp.Layers(embed, layers, head))
    tokens, targets, weights = weighed(shape_of(0), 2)
    loss, losses = pipeline.step(tokens, targets, weights=weights), pipeline.losses(tokens, targets, weights=weights)
    found = {name: p.grad for name, p in pipeline.parameters.items()}
    pipeline.close()
    whole = nn.Sequential(embed, *layers, getattr(head, "output", head)).double()
    whole.zero_grad()
    each = F.cross_entropy(whole(tokens).mT, targets, ignore_index=-100, reduction="none") * weights
    expected = each.sum() / (targets != -100).sum()
    expected.backward()
    assert abs(loss - float(expected.detach())) < 1e-12
    assert losses.mean == pytest.approx(float(expected.detach()), abs=1e-12)
    assert bool(losses.by_position) == (chosen == "logits")
    gradient = embed.weight.grad
    assert gradient is not None
    (of_embed,) = [g for name, g in found.items() if name.startswith("embed")]
    assert of_embed is not None
    assert (of_embed - gradient).norm() < 1e-9 * gradient.norm()


def pipeline_of(model: hp.Model, ranks: int = 1) -> hp.Pipeline:
    layers = model.shape.layers
    schedule = hp.build_schedule("1f1b", ranks=ranks, layers=layers, microbatches=2, model=model)
    return hp.Pipeline(model, schedule, dtype=torch.float64, timeout_s=30)


def refused(ranks: int = 1) -> list[str]:
    """On a rank: by the first step, and again."""
    pipeline = pipeline_of(Others(), ranks)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    told = []
    for call in (pipeline.step, pipeline.evaluate, pipeline.losses):
        with pytest.raises(hp.ConfigError) as caught:
            call(tokens, tokens, weights=torch.ones(2, LENGTH))
        told.append(str(caught.value))
    loss = pipeline.step(tokens, tokens)
    pipeline.close()
    assert loss > 0
    return told


def test_a_head_that_takes_targets_alone_is_refused() -> None:
    assert refused() == [TAKES_TARGETS_ALONE] * 3


def three_ranks_refuse() -> list[str]:
    """On a rank of a pipeline of two with two replicas."""
    schedule = hp.build_schedule("1f1b", ranks=2, layers=3, microbatches=1)
    pipeline = hp.Pipeline(Others(), schedule, device_mesh(sized(pp=2, dp=2)), dtype=torch.float64, timeout_s=30)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    with pytest.raises(hp.ConfigError) as caught:
        pipeline.step(tokens, tokens, weights=torch.ones(2, LENGTH))
    pipeline.close()
    return [str(caught.value)]


def test_every_rank_refuses_what_one_cannot_do(four_ranks: Ranks) -> None:
    assert four_ranks.run(three_ranks_refuse) == [[TAKES_TARGETS_ALONE]] * 4


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.square().sum()


def test_a_loss_of_plain_modules_is_refused() -> None:
    pipeline = pipeline_of(hp.Layers(nn.Embedding(19, 8), [nn.Linear(8, 8)], nn.Linear(8, 19), loss=squared))
    tokens, targets, weights = weighed(shape_of(0), 2)
    with pytest.raises(hp.ConfigError) as caught:
        pipeline.step(tokens, targets, weights=weights)
    pipeline.close()
    assert str(caught.value) == TAKES_TARGETS_ALONE.replace("head.3", "head.1")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"weights": torch.ones(2, 11)}, "weights: float32 [2, 11], and targets are [2, 12]; give as many, as float32"),
        (
            {"weights": torch.ones(2, 12, dtype=torch.int64)},
            "weights: int64 [2, 12], and targets are [2, 12]; give as many, as float32",
        ),
        (
            {"weights": torch.full((2, 12), float("inf"))},
            "weights: some are no finite numbers; give 0 to a target that is to weigh nothing",
        ),
        (
            {"counted": torch.ones(12, dtype=torch.bool)},
            "counted: bool [12], and targets are [2, 12]; give as many, as bool, or a number",
        ),
        (
            {"counted": torch.ones(2, 12)},
            "counted: float32 [2, 12], and targets are [2, 12]; give as many, as bool, or a number",
        ),
        (
            {"counted": torch.zeros(2, 12, dtype=torch.bool)},
            "counted: 0, and 22 targets of this batch alone count; give the number of all steps of the update together",
        ),
    ],
)
def test_what_cannot_be_weights_or_a_count_is_refused(given: dict[str, Tensor], line: str) -> None:
    pipeline = Case("1f1b").pipeline()
    tokens, targets, _ = weighed(shape_of(0), 2)
    with pytest.raises(hp.ConfigError) as caught:
        pipeline.step(tokens, targets, **given)
    pipeline.close()
    assert str(caught.value) == line


def test_a_number_tells_nothing_of_positions() -> None:
    pipeline = Case("1f1b").pipeline()
    tokens, targets, _ = weighed(shape_of(0), 2)
    losses = pipeline.losses(tokens, targets, 40)
    pipeline.close()
    assert (losses.counted, losses.by_position) == (40, ())
    assert losses.without == "counted is a number; give a mask [b, s] of what counts"
