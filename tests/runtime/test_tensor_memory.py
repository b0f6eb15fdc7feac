"""What a tensor-parallel rank holds, against the formulas: parameters exactly, activations within 5%."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
from oracle import batch
from ranks import Ranks
from test_mesh import Case, device_mesh, sized

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.memory import held_bytes
from helixpipe.predict.standing import owned_and_visiting
from helixpipe.predict.timeline import Timeline
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule

SHAPE = ModelShape(layers=4, hidden=64, heads=4, ffn=256, vocabulary=64, kv_heads=2, mlp="gelu", norm="layer")
SHAPES = (
    SHAPE,
    replace(SHAPE, norm="rms", norms="both", norm_offset=True, mlp="geglu", head_softcap=5.0, embed_scale=8.0),
    replace(SHAPE, norm="rms", norms="after", mlp="swiglu", qk_norm=True),
    replace(SHAPE, norm_bias=False, embed_norm=True, head_transform=True, bias=True),
)
LENGTH = 64


class Found(NamedTuple):
    """What one rank of the mesh saw: its pipeline's timeline, and the elements of what it owns."""

    pp: int
    timeline: Timeline
    owned: int


def schedule_of(case: Case) -> Schedule:
    return build_schedule(case.family, ranks=case.size("pp"), layers=4, microbatches=4, **case.options)


def measured(case: Case) -> Found:
    shape = SHAPES[case.shape]
    model = Decoder(shape, mlp_chunk=case.chunk, head_chunk=case.chunk)
    pipeline = Pipeline(model, schedule_of(case), device_mesh(case.mesh), recompute=case.recompute, timeout_s=30)
    pipeline.step(*batch(shape, 4, LENGTH))
    pipeline.close()
    owned = sum(parameter.numel() for parameter in pipeline.parameters.values())
    return Found(pipeline.mesh.here.pp, pipeline.timeline(), owned)


CASES = [
    *(
        Case(sized(pp=2, tp=2), family, recompute=recompute, options=options)
        for family, options in (("1f1b", {}), ("zb_h1", {}), ("helix", {"travel": "qkv"}))
        for recompute in ("none", "selective")
    ),
    Case(sized(pp=2, tp=2), "1f1b", recompute="none", chunk=48),  # longer than a rank's 32 tokens, and in force
    Case(sized(cp=2, tp=2), "1f1b", recompute="none"),
    Case(sized(cp=2, tp=2), "1f1b", recompute="selective"),
    *(Case(sized(pp=2, tp=2), "zb_h1", shape, recompute="none") for shape in (1, 2, 3)),
    *(Case(sized(pp=2, tp=2), "helix", shape, recompute="full", options={"travel": "qkv"}) for shape in (1, 2, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tensor_parallel_rank_holds_what_is_predicted(four_ranks: Ranks, case: Case) -> None:
    """Its share of what is divided, and the whole of what it gathers."""
    tp, group = case.size("tp"), case.size("tp") * case.size("cp")
    schedule, shape = schedule_of(case), SHAPES[case.shape]
    program = lower(schedule, shape, Batch(1, (LENGTH,)))
    keeping = Keeping(case.recompute, 4, case.chunk, case.chunk, tensor_parallel=tp, processes=group)
    predicted = held_bytes(program, keeping)
    owned, _ = owned_and_visiting(schedule, shape.tensor_share(tp))
    for found in four_ranks.run(measured, case):
        assert found.owned == sum(owned[found.pp].values())
        for points, expected in zip(found.timeline.memory, predicted, strict=True):
            held = [point.kept_bytes for point in points[1::2]]
            ended = [each.left_bytes / group for each in expected]
            largest = max(each.kept_bytes + each.workspace_bytes for each in expected) / group
            assert held == pytest.approx(ended, abs=0.05 * largest)
            assert max(point.kept_bytes + point.workspace_bytes for point in points) == pytest.approx(largest, rel=0.05)
