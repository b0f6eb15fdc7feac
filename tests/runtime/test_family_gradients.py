"""Every family on the runtime: loss to 1e-12 and every gradient to 1e-9 relative of plain autograd, in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from coverings import covering
from oracle import batch, plain_step
from ranks import Ranks, mesh_of

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import FAMILIES, build_schedule, options

LENGTHS = {1: (12,), 2: (7, 5), 3: (6, 1, 5), 5: (4, 3, 2, 2, 1)}
RECOMPUTE = ("none", "full", "selective")
# stages on a rank, where the family does not let one choose
PER_RANK = {"zb_v": 2, "v_half": 2, "v_min": 2, "dualpipe_v": 2}


@dataclass(frozen=True)
class Case:
    family: str
    ranks: int
    segments: int
    recompute: str
    microbatches: int = 4
    microbatch_size: int = 1

    def __str__(self) -> str:
        return f"{self.family}-p{self.ranks}-k{self.segments}-{self.recompute}"

    @property
    def sequences(self) -> int:
        """In a step."""
        return self.microbatches * self.microbatch_size

    @property
    def given(self) -> dict[str, Any]:
        known = options(self.family)
        found: dict[str, Any] = {"segments": self.segments} if "segments" in known else {}
        return found | ({"stages_per_rank": 2} if "stages_per_rank" in known else {})

    @property
    def shape(self) -> ModelShape:
        per_rank = self.given.get("stages_per_rank", PER_RANK.get(self.family, 1))
        layers = self.ranks * per_rank + self.ranks % 2
        return ModelShape(
            layers=layers, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19, tied=self.ranks % 2 == 0
        )


def run_case(case: Case) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    schedule = build_schedule(
        case.family, ranks=case.ranks, layers=case.shape.layers, microbatches=case.microbatches, **case.given
    )
    pipeline = Pipeline(
        Decoder(case.shape), schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30,
        segment_lengths=LENGTHS[case.segments],
    )  # fmt: skip
    tokens, targets = batch(case.shape, case.sequences, 12)
    loss = pipeline.step(tokens, targets)
    assert pipeline._ledger.bytes == 0
    assert pipeline.timeline().order == schedule.ranks, "what ran is what was scheduled"
    evaluated = pipeline.evaluate(tokens, targets)
    assert pipeline.timeline().order == schedule.forward_only().ranks
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


@functools.cache
def oracle(shape: ModelShape, sequences: int) -> tuple[float, dict[str, torch.Tensor]]:
    return plain_step(shape, *batch(shape, sequences, 12))


def holds(four_ranks: Ranks, case: Case) -> None:
    loss, gradients = oracle(case.shape, case.sequences)
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert abs(result[1] - loss) < 1e-12
        assert not found.keys() & result[2].keys()
        found |= result[2]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{name}: {error:.1e}"


def product() -> Iterator[Case]:
    for family, ranks, recompute in itertools.product(FAMILIES, (1, 2, 3, 4), RECOMPUTE):
        for segments in LENGTHS if "segments" in options(family) else (1,):
            m = max(4, 2 * ranks) if family == "dualpipe_v" else 3 if segments == 3 else 4
            yield Case(family, ranks, segments, recompute, m)


def meetings(case: Case) -> list[Hashable]:
    """Every family and k on every number of ranks, and under every policy."""
    of_family, recompute = (case.family, case.segments), case.recompute
    return [(of_family, case.ranks), (of_family, recompute), (case.family, case.ranks > 1, recompute)]


@pytest.mark.parametrize("case", covering(product(), meetings), ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.parametrize(("family", "segments"), [("seq1f1b", 3), ("helix", 1)])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_two_sequences_in_a_microbatch(four_ranks: Ranks, family: str, segments: int, recompute: str) -> None:
    """Each with keys and values of its own."""
    holds(four_ranks, Case(family, 2, segments, recompute, microbatches=3, microbatch_size=2))


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_full_product(four_ranks: Ranks, family: str) -> None:
    """Every k and policy on every number of ranks: `make test-full`."""
    for case in product():
        if case.family == family:
            holds(four_ranks, case)
