"""bf16 compute with float32 masters, gradients and travelling gradients; and what is on the wire meanwhile."""

from __future__ import annotations

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks, mesh_of

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.program import Kind

SHAPE = ModelShape(layers=3, hidden=32, heads=4, ffn=64, vocabulary=23, tied=True)


OPTIONS = {
    "helix, nothing travels": ("helix", {"travel": "none"}, None),
    "helix, qkv travels": ("helix", {"travel": "qkv"}, None),
    "helix, attention travels": ("helix", {"travel": "attention"}, None),
    "segments": ("seq1f1b", {"segments": 5}, (5, 4, 3, 2, 2)),
    "segments, split backward": ("seq1f1b_zb", {"segments": 3}, (7, 5, 4)),
}


def bf16_step(name: str) -> tuple[float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(2)
    if mesh is None:
        return None
    family, options, lengths = OPTIONS[name]
    schedule = build_schedule(family, ranks=2, layers=3, microbatches=4, **options)
    pipeline = Pipeline(
        Decoder(SHAPE), schedule, mesh, dtype=torch.bfloat16, timeout_s=30, segment_lengths=lengths
    )  # fmt: skip
    loss = pipeline.step(*batch(SHAPE, 4, 16))
    assert all(p.dtype == torch.float32 for p in pipeline.parameters.values())
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_bf16_computes_and_float32_collects(four_ranks: Ranks, name: str) -> None:
    loss, gradients = plain_step(SHAPE, *batch(SHAPE, 4, 16))
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(bf16_step, name)[:2]:
        assert abs(result[0] - loss) < 2e-2
        found |= result[1]
    for parameter, gradient in gradients.items():
        assert found[parameter].dtype == torch.float32
        error = (found[parameter].double() - gradient).norm() / gradient.norm()
        assert error < 4e-2, f"{parameter}: {error:.1e}"


def many_messages() -> tuple[int, int] | None:
    """(most bytes in flight at the end of an action, bytes of all values and gradients sent) on rank 0."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    schedule = build_schedule("1f1b", ranks=2, layers=3, microbatches=16)
    pipeline = Pipeline(Decoder(SHAPE), schedule, mesh, timeout_s=30)
    pipeline.step(*batch(SHAPE, 16, 64))
    program = pipeline.program(Batch(1, (64,)))
    sent = sum(4 * m.elements for m in program.messages if m.kind in (Kind.VALUES, Kind.GRADIENTS))
    most = max(point.transit_bytes for point in pipeline.timeline().memory[pipeline.rank])
    pipeline.close()
    return most, sent


def test_sends_are_released_when_complete_and_buffers_when_taken(four_ranks: Ranks) -> None:
    most, sent = four_ranks.run(many_messages)[0]
    assert 0 < most < sent / 4
