"""hp.Layers: plain torch modules under every family that cuts the chain at x, held to plain autograd in float64.

The oracle is the modules themselves, called one after another, with torch's own cross entropy: nothing of the library's.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks, mesh_of
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.predict.memory import held_bytes
from helixpipe.schedule.families import FAMILIES, options

WORDS, HIDDEN, LENGTH = 19, 16, 12
RECOMPUTE = ("none", "full", "selective")
AT_X = (
    "gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v", "constructed",
)  # fmt: skip
PER_RANK = {"zb_v": 2, "v_half": 2, "v_min": 2, "dualpipe_v": 2, "interleaved": 2, "breadth_first": 2}


class Convolution(nn.Module):
    """Causal: every token sees itself and two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.RMSNorm(HIDDEN), nn.Conv1d(HIDDEN, HIDDEN, 3), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.mix(F.pad(self.norm(x).mT, (2, 0))).mT))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rnn(x)[0]


class Turned(nn.Module):
    """x [b, s, h] -> [b, s, 2, h/2] and back: x may have any shape, and layers may change it."""

    def __init__(self, there: bool) -> None:
        super().__init__()
        self.linear, self.there = nn.Linear(HIDDEN, HIDDEN), there

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (2, -1)) if self.there else self.linear(x.flatten(-2))


class OwnLoss(nn.Module):
    """Squared distance of a token from its target's row, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(WORDS, HIDDEN)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        counts = targets != -100
        return (x[counts] - self.rows(targets[counts])).square().sum()


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(HIDDEN, 2, 24, dropout=0.0, batch_first=True)


MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "convolution": lambda layer: Convolution(),
    "recurrent": lambda layer: Recurrent(),
    "transformer": lambda layer: transformer(),
    "mixed": lambda layer: [Convolution, transformer, Recurrent][layer % 3](),
    "turned": lambda layer: Turned(layer % 2 == 0),
    "tied": lambda layer: Convolution(),
    "own_loss": lambda layer: Convolution(),
}


def modules(name: str, layers: int) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """The same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head: nn.Module = OwnLoss() if name == "own_loss" else nn.Linear(HIDDEN, WORDS)
        embed = nn.Embedding(WORDS, HIDDEN)
        if name == "tied":
            assert isinstance(head, nn.Linear)
            head.weight = embed.weight
        return embed, [MAKERS[name](layer) for layer in range(layers)], head


def batch(sequences: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(WORDS, (2, sequences, LENGTH), generator=generator)
    targets[:, LENGTH // 3] = -100
    targets[0, :5] = -100  # micro-batches count differently
    return tokens, targets


@dataclass(frozen=True)
class Case:
    model: str
    family: str
    ranks: int
    recompute: str
    microbatch_size: int = 1

    def __str__(self) -> str:
        return f"{self.model}-{self.family}-p{self.ranks}-{self.recompute}"

    @property
    def layers(self) -> int:
        return self.ranks * PER_RANK.get(self.family, 1) + self.ranks % 2

    @property
    def microbatches(self) -> int:
        return max(4, 2 * self.ranks) if self.family == "dualpipe_v" else 4


@functools.cache
def oracle(name: str, layers: int, sequences: int) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and every gradient, by name."""
    embed, middle, head = copy.deepcopy(modules(name, layers))
    tokens, targets = batch(sequences)
    whole = nn.ModuleDict({"embed": embed, "layers": nn.ModuleList(middle), "head": head}).double()
    x = embed(tokens)
    for layer in middle:
        x = layer(x)
    if name == "own_loss":
        loss = head(x, targets) / (targets != -100).sum()
    else:
        loss = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def run_case(case: Case) -> tuple[float, float, dict[str, Tensor]] | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    model = hp.Layers(*modules(case.model, case.layers))
    schedule = hp.build_schedule(case.family, ranks=case.ranks, model=model, microbatches=case.microbatches)
    pipeline = hp.Pipeline(model, schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30)
    tokens, targets = batch(case.microbatches * case.microbatch_size)
    loss = pipeline.step(tokens, targets)
    assert pipeline._ledger.bytes == 0
    assert pipeline.timeline().order == schedule.ranks, "what ran is what was scheduled"
    evaluated = pipeline.evaluate(tokens, targets)
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


def covering() -> list[Case]:
    """Every family on one to three ranks, every model, every policy; models and policies in turn."""
    found = []
    names = ("convolution", "recurrent", "transformer", "mixed")
    for i, (family, ranks) in enumerate(itertools.product(AT_X, (1, 2, 3))):
        found.append(Case(names[(i + i // 4) % 4], family, ranks, RECOMPUTE[(i + i // 3) % 3], 1 + i % 2))
    for i, (name, recompute) in enumerate(itertools.product(("turned", "tied", "own_loss"), RECOMPUTE)):
        found.append(Case(name, ("1f1b", "zb_h1", "dualpipe_v")[i // 3 - i % 3], 2, recompute))
    return found


@pytest.mark.parametrize("case", covering(), ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    loss, gradients = oracle(case.model, case.layers, case.microbatches * case.microbatch_size)
    found: dict[str, Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert abs(result[1] - loss) < 1e-12
        assert not found.keys() & result[2].keys()
        found |= result[2]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
        assert error < 1e-9, f"{name}: {error:.1e}"


Bytes = list[tuple[list[int], int]]
"""By rank: kept at the end of each action, and the most of kept and workspace."""


def measured_and_predicted(name: str, recompute: str) -> tuple[Bytes, Bytes] | None:
    """Of a second step."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    model = hp.Layers(*modules(name, 6))
    schedule = hp.build_schedule("1f1b", ranks=2, model=model, microbatches=4)
    pipeline = hp.Pipeline(model, schedule, mesh, recompute=recompute, timeout_s=30)
    tokens, targets = (torch.randint(WORDS, (4, 256), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for _ in range(2):
        pipeline.step(tokens, targets)
    points = pipeline.timeline().memory
    pipeline.close()
    measured = [
        ([point.kept_bytes for point in rank[1::2]], max(point.kept_bytes + point.workspace_bytes for point in rank))
        for rank in points
    ]
    predicted = [
        ([held.left_bytes for held in rank], max(held.kept_bytes + held.workspace_bytes for held in rank))
        for rank in held_bytes(pipeline.last_program, pipeline.keeping)
    ]
    return measured, predicted


@pytest.mark.parametrize("name", ["convolution", "transformer"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_predicted_bytes_are_those_measured(four_ranks: Ranks, name: str, recompute: str) -> None:
    """What is in transit depends on clocks, and is left out. Tokens and targets, which graphs save, are in the 5%."""
    for (kept, most), (expected, high) in zip(*four_ranks.run(measured_and_predicted, name, recompute)[0], strict=True):
        assert kept == pytest.approx(expected, abs=0.05 * max(expected))
        assert most == pytest.approx(high, rel=0.05)


def test_the_cases_cover_every_family_model_and_policy() -> None:
    cases = covering()
    assert {case.family for case in cases} == set(AT_X)
    whole = {family for family in FAMILIES if not {"segments", "travel"} & set(options(family))}
    assert whole | {"constructed"} == set(AT_X), "which has segments where it is asked for some"
    assert {(case.family, case.ranks) for case in cases} >= set(itertools.product(AT_X, (1, 2, 3)))
    assert {(case.model, case.recompute) for case in cases} == set(itertools.product(MAKERS, RECOMPUTE))
