"""The norm of all ranks' gradients, and clipping by it, as torch does on one process."""

from __future__ import annotations

import math

import torch
from oracle import batch, plain_step
from ranks import Ranks, mesh_of

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=3, hidden=16, heads=2, ffn=32, vocabulary=17)


def clipped(limit: float) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(3)
    if mesh is None:
        return None
    schedule = build_schedule("helix", ranks=3, layers=3, microbatches=4)
    pipeline = Pipeline(Decoder(SHAPE), schedule, mesh, dtype=torch.float64, timeout_s=30)
    pipeline.step(*batch(SHAPE, 4, 8))
    norm = pipeline.clip_gradients(limit)
    again = pipeline.clip_gradients(math.inf)
    pipeline.close()
    return norm, again, {name: p.grad for name, p in pipeline.parameters.items()}


def test_clipping_is_over_all_ranks(four_ranks: Ranks) -> None:
    _, gradients = plain_step(SHAPE, *batch(SHAPE, 4, 8))
    expected = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    for limit in (expected / 3, expected * 3):
        results = [r for r in four_ranks.run(clipped, limit) if r is not None]
        assert len({norm for norm, _, _ in results}) == 1
        for norm, again, mine in results:
            assert abs(norm - expected) < 1e-12
            assert math.isclose(again, min(norm, limit), rel_tol=1e-5)
            for name, gradient in mine.items():
                torch.testing.assert_close(gradient, gradients[name] * min(1.0, limit / (norm + 1e-6)))
