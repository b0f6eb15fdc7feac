"""A probe: another token in the first document of a sequence changes the losses of that document, and nothing else, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import batch
from packing import LENGTH, PACKINGS, SEGMENTS
from ranks import Ranks, mesh_of
from test_document_gradients import Case
from test_mesh import device_mesh, sized

import helixpipe as hp

DOCUMENTS = PACKINGS["inside"][:4]


@dataclass
class Probed:
    """Of one rank."""

    apart: list[tuple[float, float]]
    """Of each document of the sequence its loss, before and after."""
    others: tuple[list[torch.Tensor], list[torch.Tensor]]
    """Gradients of all other documents, before and after."""


def probe(case: Case, changed: int) -> Probed | None:
    """On a rank: change the first token of the first document of sequence `changed`."""
    is_line = case.mesh == sized(pp=case.size("pp"))
    mesh = mesh_of(case.size("pp")) if is_line else device_mesh(case.mesh)
    if mesh is None:
        return None
    shape = case.whole
    schedule = hp.build_schedule(
        case.family, ranks=case.size("pp"), layers=shape.layers, microbatches=4, **case.options
    )
    pipeline = hp.Pipeline(
        hp.Decoder(shape), schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30,
        segment_lengths=SEGMENTS[case.segments], context_method=case.method, layout=case.layout,
    )  # fmt: skip
    tokens, targets = batch(shape, 4, LENGTH)
    other = tokens.clone()
    other[changed, 0] = (tokens[changed, 0] + 1) % shape.vocabulary
    apart, begin = [], 0
    for length in DOCUMENTS[changed]:
        alone = torch.full_like(targets, -100)
        alone[changed, begin : begin + length] = 1
        begin += length
        apart.append(tuple(pipeline.evaluate(given, alone, documents=DOCUMENTS) for given in (tokens, other)))
    rest = targets.clone()
    rest[changed, : DOCUMENTS[changed][0]] = -100
    gradients = []
    for given in (tokens, other):
        pipeline.zero_gradients()
        pipeline.step(given, rest, documents=DOCUMENTS)
        gradients.append([p.grad for p in pipeline.parameters.values()])
    pipeline.close()
    return Probed(apart, (gradients[0], gradients[1]))


def cases() -> list[tuple[Case, int]]:
    two: dict[str, Any] = {"mesh": sized(pp=2)}
    context: dict[str, Any] = {"mesh": sized(pp=2, cp=2)}
    found = [
        Case("1f1b", **two),
        Case("helix", **two, shape=3, recompute="none"),
        Case("interleaved", **two, shape=1, recompute="full"),
        Case("zb_v", **two, shape=4),
        Case("seq1f1b", **two, segments=3, shape=2),
        Case("seq1f1b_zb", **two, segments=5, recompute="none"),
        Case("seq1f1b", **context, segments=3, layout="zigzag"),
        Case("1f1b", **context, layout="striped", shape=3),
        Case("seq1f1b", **context, segments=3, layout="plain", shape=1),
        Case("helix", **context, method="ulysses", layout="plain"),
        Case("seq1f1b", sized(pp=2, tp=2), segments=3, recompute="full"),
    ]
    return [(case, (0, 1, 3)[i % 3]) for i, case in enumerate(found)]


@pytest.mark.parametrize(("case", "changed"), cases(), ids=str)
def test_a_token_reaches_its_own_document_alone(four_ranks: Ranks, case: Case, changed: int) -> None:
    for result in four_ranks.run(probe, case, changed):
        if result is None:
            continue
        (before, after), *rest = result.apart
        assert before != after
        for before, after in rest:
            assert before == after
        for one, two in zip(*result.others, strict=True):
            assert torch.equal(one, two)
