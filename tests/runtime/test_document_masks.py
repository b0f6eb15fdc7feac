"""Targets that do not count: of a segment, a micro-batch, a replica, of all but one token; documents or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import batch
from packing import LENGTH, PACKINGS, SEGMENTS, assert_equal, packed_step
from ranks import Ranks
from test_mesh import Found, assembled, device_mesh, sized
from torch import Tensor

import helixpipe as hp

SHAPE = hp.ModelShape(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19)
WHOLE = ((LENGTH,),) * 4


def run(
    mesh: tuple[tuple[str, int], ...], segments: int, targets: Tensor, documents: tuple[tuple[int, ...], ...] | None,
    options: dict[str, Any],
) -> Found:  # fmt: skip
    """On a rank: four sequences."""
    sizes = dict(mesh)
    family, given = ("1f1b", {}) if segments == 1 else ("seq1f1b", {"segments": segments})
    ranks, replicas = sizes.get("pp", 1), sizes.get("dp", 1)
    schedule = hp.build_schedule(family, ranks=ranks, layers=2, microbatches=4 // replicas, **given)
    pipeline = hp.Pipeline(
        hp.Decoder(SHAPE), schedule, device_mesh(mesh), dtype=torch.float64, timeout_s=30,
        segment_lengths=SEGMENTS[segments], **options,
    )  # fmt: skip
    tokens, _ = batch(SHAPE, 4, LENGTH)
    loss = pipeline.step(tokens, targets, documents=documents)
    evaluated = pipeline.evaluate(tokens, targets, documents=documents)
    pipeline.close()
    gradients = {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}
    return Found(pipeline.mesh.here, loss, evaluated, 0.0, gradients, pipeline._tensor.cuts if pipeline._tensor else {})


def holds(
    ranks: Ranks, mesh: tuple[tuple[str, int], ...], segments: int, targets: Tensor,
    documents: tuple[tuple[int, ...], ...] | None, **options: Any,
) -> None:  # fmt: skip
    tokens, _ = batch(SHAPE, 4, LENGTH)
    loss, gradients = packed_step(SHAPE, tokens, targets, documents or WHOLE)
    results = ranks.run(run, mesh, segments, targets, documents, options)
    for result in results:
        assert abs(result.loss - loss) < 1e-12
        assert abs(result.evaluated - loss) < 1e-12
    assert_equal(assembled(results), gradients)


@pytest.mark.parametrize("documents", [None, PACKINGS["inside"][:4]], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("mesh", "what"),
    [
        (sized(pp=2, dp=2), "segment"),
        (sized(pp=2, cp=2), "microbatch"),
        (sized(pp=2, dp=2), "replica"),
        (sized(dp=2, cp=2), "replica"),
    ],
    ids=str,
)
def test_what_does_not_count_changes_nothing_elsewhere(
    four_ranks: Ranks, mesh: tuple[tuple[str, int], ...], what: str, documents: tuple[tuple[int, ...], ...] | None
) -> None:
    _, targets = batch(SHAPE, 4, LENGTH)
    match what:
        case "segment":
            targets[0, 12:16] = -100
        case "microbatch":
            targets[1] = -100
        case "replica":
            targets[2:] = -100
    holds(four_ranks, mesh, 3, targets, documents)


@pytest.mark.parametrize("documents", [None, PACKINGS["inside"][:4]], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("mesh", "segments", "options"),
    [
        (sized(pp=2, dp=2), 1, {}),
        (sized(pp=2, cp=2), 3, {}),
        (sized(dp=2, cp=2), 3, {"layout": "striped"}),
        (sized(cp=4), 1, {"context_method": "ulysses"}),
    ],
    ids=str,
)
def test_one_token_that_counts_gives_what_one_process_does(
    four_ranks: Ranks,
    mesh: tuple[tuple[str, int], ...],
    segments: int,
    options: dict[str, Any],
    documents: tuple[tuple[int, ...], ...] | None,
) -> None:
    targets = torch.full((4, LENGTH), -100)
    targets[1, 13] = 7
    holds(four_ranks, mesh, segments, targets, documents, **options)
