"""Loss to 1e-12 and every gradient to 1e-9 relative of plain autograd, in float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks, mesh_of

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

BASE: dict[str, Any] = {"layers": 3, "hidden": 16, "heads": 4, "ffn": 24, "vocabulary": 19}
LENGTH = 12


@dataclass(frozen=True)
class Case:
    ranks: int
    microbatches: int
    family: str = "helix"
    options: dict[str, Any] = field(default_factory=dict)
    recompute: str = "selective"
    chunk: int = 0
    shape: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.family, f"p{self.ranks}", f"m{self.microbatches}", self.recompute, f"chunk{self.chunk}"]
        words += [f"{k}={v}" for k, v in {**self.options, **self.shape}.items()]
        return "-".join(words)


def run_case(case: Case) -> tuple[float, dict[str, torch.Tensor]] | None:
    """On a rank of the four: this rank's loss and gradients; None on the ranks the case does not use."""
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    shape = ModelShape(**(BASE | case.shape))
    schedule = build_schedule(
        case.family, ranks=case.ranks, layers=shape.layers, microbatches=case.microbatches, **case.options
    )
    model = Decoder(shape, mlp_chunk=case.chunk, head_chunk=case.chunk)
    pipeline = Pipeline(model, schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30)
    loss = pipeline.step(*batch(shape, case.microbatches, LENGTH))
    evaluated = pipeline.evaluate(*batch(shape, case.microbatches, LENGTH))
    assert abs(loss - evaluated) < 1e-12
    assert pipeline._ledger.bytes == 0
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}


@functools.cache
def oracle(shape: ModelShape, microbatches: int) -> tuple[float, dict[str, torch.Tensor]]:
    return plain_step(shape, *batch(shape, microbatches, LENGTH))


def holds(four_ranks: Ranks, case: Case) -> None:
    shape = ModelShape(**(BASE | case.shape))
    loss, gradients = oracle(shape, case.microbatches)
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert not found.keys() & result[1].keys(), "a parameter has two owners"
        found |= result[1]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert found[name] is not None, name
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
        assert error < 1e-9, f"{name}: {error:.1e}"


SHAPES: list[dict[str, Any]] = [
    {"tied": True},
    {"causal": False, "mlp": "gelu", "norm": "layer", "bias": True, "qkv_bias": True},
    {"kv_heads": 2, "qk_norm": True},
    {"tied": True, "positions": "learned", "context": 16, "mlp": "gelu", "head_dim": 6, "kv_heads": 1},
    {"tied": True, "causal": False, "kv_heads": 2},
    {
        "norms": "both",
        "norm_offset": True,
        "embed_scale": 4.0,
        "mlp": "geglu_tanh",
        "head_softcap": 3.0,
        "o_bias": True,
    },
    {
        "norms": "after",
        "embed_norm": True,
        "norm": "layer",
        "norm_bias": False,
        "head_transform": True,
        "tied": True,
        "causal": False,
        "kv_heads": 2,
    },
]
TRAVEL = ("none", "qkv", "attention")
RECOMPUTE = ("none", "full", "selective")
COUNTS = (1, 2, 3, 4, 6, 8)
RANKS = (1, 2, 3, 4)
GROUPS = ("sequential", "forward_first")


def choices(case: Case) -> dict[str, Any]:
    """What a helix case chose, choice by choice."""
    shape = {"tied": False, "causal": True, **case.shape, "gqa": "kv_heads" in case.shape}
    picked = {name: shape[name] for name in ("layers", "tied", "causal", "gqa")}
    return picked | case.options | {
        "ranks": case.ranks, "m": case.microbatches, "recompute": case.recompute, "chunk": case.chunk,
    }  # fmt: skip


def pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(sorted(choices(case).items()), 2))


def covering() -> list[Case]:
    """Every (ranks, m, travel); the rest chosen so that every two values of two choices meet in some case."""
    rest = list(itertools.product((1, 2, 3), GROUPS, RECOMPUTE, (0, 5), (1, 2, 3, 4, 5), SHAPES))
    random = Random(0)
    cases: list[Case] = []
    met: set[Any] = set()
    for ranks, m, travel in itertools.product(RANKS, COUNTS, TRAVEL):
        candidates = [
            Case(ranks, m, "helix", {"folds": folds, "travel": travel, "groups": groups}, recompute, chunk,
                 {"layers": layers, **shape})
            for folds, groups, recompute, chunk, layers, shape in random.sample(rest, 60)
        ]  # fmt: skip
        cases.append(max(candidates, key=lambda case: len(pairs(case) - met)))
        met |= pairs(cases[-1])
    for i, (ranks, m, family) in enumerate(itertools.product(RANKS, (1, 3, 4), ("gpipe", "1f1b"))):
        shape = {"layers": ranks + i % 3, **SHAPES[i % len(SHAPES)]}
        cases.append(Case(ranks, m, family, {}, RECOMPUTE[i % 3], (0, 5)[i % 2], shape))
    return cases


def test_every_two_choices_meet() -> None:
    cases = [case for case in covering() if case.family == "helix"]
    values: dict[str, set[Any]] = {}
    for case in cases:
        for name, value in choices(case).items():
            values.setdefault(name, set()).add(value)
    met = set().union(*(pairs(case) for case in cases))
    wanted = {
        ((one, x), (two, y))
        for one, two in itertools.combinations(sorted(values), 2)
        for x, y in itertools.product(values[one], values[two])
    }
    assert not wanted - met


@pytest.mark.parametrize("case", covering(), ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


def product(ranks: int, microbatches: int) -> list[Case]:
    found = []
    for folds, travel, recompute, chunk, layers in itertools.product((1, 2), TRAVEL, RECOMPUTE, (0, 5), (3, 4)):
        for tied, causal, kv_heads in itertools.product((False, True), (False, True), (4, 2)):
            shape = {"layers": layers, "tied": tied, "causal": causal, "kv_heads": kv_heads}
            options = {"folds": folds, "travel": travel}
            found.append(Case(ranks, microbatches, "helix", options, recompute, chunk, shape))
    return found


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("microbatches", COUNTS)
def test_gradients_full_product(four_ranks: Ranks, ranks: int, microbatches: int) -> None:
    """576 cases each, 13,824 in all: `make test-full`."""
    for case in product(ranks, microbatches):
        holds(four_ranks, case)
