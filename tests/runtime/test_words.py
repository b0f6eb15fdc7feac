"""What ranks tell each other when a step has ended: one exchange beside its messages, and the host reads its device once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch, plain_step
from others import SIZES, Listing, Others
from ranks import Ranks, mesh_of
from test_exchanges import Collectives
from test_mesh import device_mesh, sized
from torch import Tensor, nn

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.predict.timeline import Totals
from helixpipe.runtime.mesh import Place
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.words import Told, Word, flagged, flags, told
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=4, hidden=16, heads=2, ffn=32, vocabulary=17, tied=True)


@pytest.mark.parametrize("count", [0, 1, 32, 33, 70])
def test_flags_of_any_rank_are_found_again(count: int) -> None:
    names = [f"p{i}" for i in range(count)]
    ranks = [[i % 3 == rank or i == 31 for i in range(count)] for rank in (0, 1)]
    rows = [[*Word(0.0, 0.0), *flags(mine)] for mine in ranks]
    assert flagged(names, rows) == {name for i, name in enumerate(names) if i % 3 < 2 or i == 31}


def test_a_step_is_told_from_its_ranks_words() -> None:
    """Replicas add nothing to a norm, tp ranks what is divided; a step begins with the first rank, and is of one pipeline."""
    places = [Place(pp, dp) for pp in (0, 1) for dp in (0, 1)]
    words = [
        Word(0.25, 0, 3.0, 4.0, 1.0, 5.0, 2.0, 100.0, 2), Word(0.5, 0, 3.0, 4.0, 9.0, 90.0, 9.0, 9.0, 2),
        Word(0.0, 0, 1.0, 8.0, 2.0, 7.0, 4.0, 300.0, 2), Word(0.25, 0, 1.0, 8.0, 9.0, 90.0, 9.0, 9.0, 2),
    ]  # fmt: skip
    said = ((0.0, 1.0), (15.0, 2.0), (0.0, 3.0), (0.0, 4.0))
    rows = [[*word, *flags([True]), *more] for word, more in zip(words, said, strict=True)]
    found = told(rows, places, (0, 2), normed=True)
    assert found == Told(1.0, 4.0, Totals(6.0, (2.0, 4.0), (100, 300)), said)
    assert found.totals.bubble_ratio == 0.5
    assert math.isnan(told(rows, places, (0, 2), normed=False).gradient_norm)


def step_of(mesh: tuple[tuple[str, int], ...], family: str, limit: float) -> Any:
    """On a rank: exchanges of a step beside its messages, what was told, gradients; and the norm by `clip_gradients`."""
    made = device_mesh(mesh)
    ranks, replicas = dict(mesh).get("pp", 1), dict(mesh).get("dp", 1)
    schedule = build_schedule(family, ranks=ranks, layers=4, microbatches=2)
    pipeline = Pipeline(Decoder(SHAPE), schedule, made, dtype=torch.float64, timeout_s=30)
    data = batch(SHAPE, 2 * replicas, 8)
    pipeline.step(*data)
    norm = pipeline.clip_gradients(limit)
    clipped = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    pipeline.zero_gradients()
    with Collectives() as seen:
        loss = pipeline.step(*data, clip_norm=limit, say=lambda: (dist.get_rank(),))
    calls = [name for name, _ in seen.seen if name not in ("send", "recv_")]
    timeline, heard = pipeline.timeline(), pipeline.told
    assert heard is not None
    same = all(torch.equal(p.grad, clipped[name]) for name, p in pipeline.parameters.items() if p.grad is not None)
    pipeline.close()
    return calls, loss, heard, norm, same, timeline


@pytest.mark.parametrize(
    ("mesh", "family", "calls"),
    [
        (sized(pp=4), "1f1b", ["allgather_"]),
        (sized(pp=4), "helix", ["allgather_"]),  # weights travel, the tied table too
        (sized(pp=2, dp=2), "1f1b", ["allreduce_", "allgather_"]),
    ],
)
def test_a_step_ends_in_one_exchange_that_has_all(four_ranks: Ranks, mesh: Any, family: str, calls: list[str]) -> None:
    replicas = dict(mesh).get("dp", 1)
    expected, _ = plain_step(SHAPE, *batch(SHAPE, 2 * replicas, 8))
    for seen, loss, all_told, norm, same, timeline in four_ranks.run(step_of, mesh, family, 0.05):
        assert seen == calls
        assert abs(loss - expected) < 1e-12
        assert (all_told.loss, all_told.gradient_norm, all_told.said) == (
            loss,
            norm,
            tuple((float(r),) for r in range(4)),
        )
        assert norm > 0.05
        assert same, "clipped in the step is clipped after it"
        assert all_told.totals.makespan_s == pytest.approx(timeline.makespan_s, rel=1e-6)
        assert all_told.totals.busy_s == pytest.approx(timeline.busy_s, rel=1e-6)
        assert all_told.totals.peak_activation_bytes == timeline.peak_activation_bytes


class Late(nn.Module):
    """Hands on what it reads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Tensor) -> Any:
        return self.inner(*given)


class LateShape(Listing):
    def parameters(self, part: Any) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"inner.{name}": size for name, size in found.items()} if part.kind == "norm" else found


def late() -> str | None:
    """On a rank: a buffer comes to a visiting part after ranks had agreed that there is none."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    model = Others(LateShape(**SIZES), lambda part, module: Late(module) if part.kind == "norm" else module)
    schedule = build_schedule("helix", ranks=2, layers=3, microbatches=2, travel="attention")
    pipeline = Pipeline(model, schedule, mesh, dtype=torch.float64, timeout_s=30)
    data = batch(model.shape, 2, 8)
    pipeline.step(*data)
    for module in pipeline._weights.modules.values():
        if isinstance(module, Late):
            module.register_buffer("scale", torch.ones(1))
    try:
        pipeline.step(*data)
    except ConfigError as error:
        return str(error)
    finally:
        pipeline.close()
    return "no error"


def test_a_buffer_that_comes_late_to_a_part_that_visits_is_named(four_ranks: Ranks) -> None:
    said = {each for each in four_ranks.run(late) if each is not None}
    told = r"layers.0.norm.scale: a buffer that norm.0 got after the pipeline was made, and would not travel; register it before"
    assert said == {told}
