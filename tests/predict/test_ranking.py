"""benchmarks/planning/ranking.py: the plans that it runs can be run and priced, and what it says of them is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planning.ranking import PLANS, Contender, Kind, Model, Planned, Record, correlation, rows, summary
from ranks import Ranks

from helixpipe.parts.shape import ModelShape
from helixpipe.predict.hardware import Link
from helixpipe.predict.profile import CURVES, PASSES, Timing

SMALL = Model(ModelShape(layers=8, hidden=32, heads=8, kv_heads=4, ffn=16, vocabulary=32), length=128)
LINK = Link("measured", 1e9, 1e-4, "here")


def record() -> Record:
    """As if a token of any part took as long in all passes, on whatever ranks."""
    kinds = {plan.kind for plan in PLANS}
    assert Kind(2) in kinds  # whose messages price those of four too
    timings = [Timing(kind, PASSES[name], n, 0, 1e-6 * n) for kind, name in CURVES for n in (64, 128)]
    steps = {plan.name: [1.0, 2.0, 3.0] for plan in PLANS}
    return Record(
        "a machine", dict.fromkeys(kinds, timings), {kind: [(LINK, LINK)] for kind in kinds}, steps,
        heap_bytes={plan.name: [2**20] for plan in PLANS},
    )  # fmt: skip


def test_every_plan_is_priced_from_the_profile_of_its_group(tmp_path: Path) -> None:
    assert len({plan.name for plan in PLANS}) == len(PLANS) == 24
    assert [sum(plan.mesh.size == ranks for plan in PLANS) for ranks in (2, 4)] == [12, 12]
    record().save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == record()
    found = list(rows(record(), SMALL))
    assert len(found) == len(PLANS)
    assert all(row["predicted_s"] > 0 < row["predicted_bytes"] and row["step_s"] == 2.0 for row in found)


def test_a_plan_names_the_group_that_its_parts_are_timed_in() -> None:
    kinds = {plan.name: plan.kind for plan in PLANS}
    assert kinds["pp 4, 1f1b, recompute none"] == Kind(4)
    assert kinds["pp 2 x tp 2, interleaved, stages_per_rank 2, recompute selective"] == Kind(4, tp=2)
    assert kinds["dp 2, recompute none"] == Kind(2)
    assert kinds["cp 4, ring, recompute none"] == Kind(4, cp=4)


def test_the_correlation_is_of_ranks() -> None:
    assert correlation([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 11.0, 1000.0]) == pytest.approx(1)
    assert correlation([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert correlation([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 4.0, 3.0, 5.0]) == pytest.approx(0.9)
    two = [{"step_s": 1.0, "predicted_s": 1.05, "heap_bytes": 100, "predicted_bytes": 80}] * 2
    two[1] = two[1] | {"step_s": 2.0, "predicted_s": 2.4}
    assert summary(two) == (
        "rank correlation 1.000; step 1.050 to 1.200, 1 of 2 within 10%; heap 0.800 to 0.800, 0 of 2 within 10%"
    )


def step_of(plan: Planned) -> list[torch.Tensor]:
    """Two steps; what became of a parameter that all have, or none."""
    contender = Contender(plan, SMALL)
    before = {name: p.detach().clone() for name, p in contender.pipeline.parameters.items()}
    contender.step()
    contender.step()
    contender.pipeline.close()
    return [p.detach() - before[name] for name, p in contender.pipeline.parameters.items()]


def test_a_step_is_training_s(four_ranks: Ranks) -> None:
    """Gradients and an update, on a mesh with a sharded optimizer: all replicas have all updates."""
    (plan,) = (plan for plan in PLANS if plan.mesh.dp == plan.mesh.pp == 2)
    found = four_ranks.run(step_of, replace(plan))
    assert all(moved.abs().max() > 0 for rank in found for moved in rank)
    for here, there in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(found[here], found[there], strict=True))
