"""I and W, R, and segments of unequal length: against plain autograd, in float64, whatever the order of W."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import batch, plain_attention, plain_step
from ranks import Ranks, mesh_of

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.model.kernels import attention_forward
from helixpipe.model.merging import merge
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.schedule import Schedule

SHAPE = ModelShape(layers=4, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19, tied=True)
LENGTHS = {1: (12,), 2: (7, 5), 3: (6, 1, 5), 5: (4, 3, 2, 2, 1)}


@dataclass(frozen=True)
class Case:
    ranks: int
    segments: int
    backward: str
    """`B`; `IW` one after the other; `I..W` all W at the end; `RB` and `RIW` recompute ahead."""
    recompute: str
    chunk: int = 0
    stages_per_rank: int = 1

    def __str__(self) -> str:
        return (
            f"p{self.ranks}-k{self.segments}-{self.backward}-{self.recompute}-chunk{self.chunk}-v{self.stages_per_rank}"
        )


def schedule_of(case: Case, microbatches: int = 3) -> Schedule:
    """All segments forward, then all backward, last segment first: by hand, so that no family is needed."""
    stages = case.ranks * case.stages_per_rank
    orders = []
    for rank in range(case.ranks):
        mine = range(rank, stages, case.ranks)
        units = list(itertools.product(range(microbatches), range(case.segments)))
        order = [Action(s, Pass.F, mb, seg) for s in mine for mb, seg in units]
        last: list[Action] = []
        for s in reversed(mine):
            for mb, seg in sorted(units, key=lambda unit: (unit[0], -unit[1])):
                for kind in case.backward.replace("..", ""):
                    late = "..W" in case.backward and kind == "W"
                    (last if late else order).append(Action(s, Pass(kind), mb, seg))
        orders.append(tuple(order + last))
    return Schedule(split_layers(SHAPE.layers, stages), tuple(orders))


def run_case(case: Case) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    model = Decoder(SHAPE, mlp_chunk=case.chunk, head_chunk=case.chunk)
    pipeline = Pipeline(
        model, schedule_of(case), mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30,
        segment_lengths=LENGTHS[case.segments],
    )  # fmt: skip
    tokens, targets = batch(SHAPE, 3, 12)
    loss = pipeline.step(tokens, targets)
    assert pipeline._ledger.bytes == 0
    evaluated = pipeline.evaluate(tokens, targets)
    assert pipeline._ledger.bytes == 0
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


RANKS = (1, 2, 4)
BACKWARDS = ("B", "IW", "I..W", "RB", "RIW")
POLICIES = ("none", "full", "selective")
CHUNKS = (0, 3, 5)


def choices(case: Case) -> list[tuple[str, Any]]:
    """What a case chose; stages on a rank follow from the ranks."""
    return [(name, getattr(case, name)) for name in ("ranks", "segments", "backward", "recompute", "chunk")]


def meetings(case: Case, size: int) -> set[Any]:
    return set(itertools.combinations(choices(case), size))


def covering() -> list[Case]:
    """Every (backward, recompute, segments); ranks and chunks chosen so that every two choices meet, and most three."""
    cases: list[Case] = []
    met: set[Any] = set()
    for backward, recompute, segments in itertools.product(BACKWARDS, POLICIES, LENGTHS):
        candidates = [
            Case(ranks, segments, backward, recompute, chunk, 2 if ranks == 2 else 1)
            for ranks, chunk in itertools.product(RANKS, CHUNKS)
        ]
        cases.append(max(candidates, key=lambda case: len(meetings(case, 3) - met)))
        met |= meetings(cases[-1], 3)
    return cases


def test_every_two_choices_meet() -> None:
    values = {"ranks": RANKS, "segments": LENGTHS, "backward": BACKWARDS, "recompute": POLICIES, "chunk": CHUNKS}
    wanted = {
        ((one, x), (two, y))
        for one, two in itertools.combinations(values, 2)
        for x, y in itertools.product(values[one], values[two])
    }
    assert not wanted - set().union(*(meetings(case, 2) for case in covering()))


@functools.cache
def oracle() -> tuple[float, dict[str, torch.Tensor]]:
    return plain_step(SHAPE, *batch(SHAPE, 3, 12))


@pytest.mark.parametrize("case", covering(), ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    loss, gradients = oracle()
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert abs(result[1] - loss) < 1e-12
        found |= result[2]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{name}: {error:.1e}"


def test_merge_of_two_sets_of_keys() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=torch.float64) for _ in range(3))
    whole = plain_attention(q, k, v, False)
    merged = merge(
        *attention_forward(q, k[:, :, :3], v[:, :, :3], False), *attention_forward(q, k[:, :, 3:], v[:, :, 3:], False)
    )
    torch.testing.assert_close(merged[0], whole[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged[1], whole[1], rtol=1e-13, atol=1e-13)


def refused(schedule: Schedule, shape: ModelShape, lengths: tuple[int, ...]) -> str:
    with pytest.raises(ConfigError) as error:
        Pipeline(Decoder(shape), schedule, segment_lengths=lengths)
    return str(error.value)


def test_segments_that_cannot_be() -> None:
    schedule = schedule_of(Case(1, 2, "B", "none"))
    assert refused(schedule, SHAPE, (12,)) == (
        "segment_lengths: (12,); the schedule has 2 segments: give as many lengths, none 0"
    )
    bidirectional = ModelShape(layers=4, hidden=16, heads=4, ffn=24, vocabulary=19, causal=False)
    assert refused(schedule, bidirectional, (6, 6)) == (
        "model.causal: false; a segment of bidirectional attention needs the segments after it: use helix, or one segment"
    )
    opaque = Schedule(split_layers(4, 1, opaque=(1,)), schedule.ranks)
    assert refused(opaque, SHAPE, (6, 6)) == (
        "schedule.segments: block.1 is opaque, so what it carries from segment to segment is not known"
    )
    pipeline = Pipeline(Decoder(SHAPE), schedule, segment_lengths=(7, 4))
    with pytest.raises(ConfigError, match=r"tokens: 12 a sequence, and the segments \[7, 4\] add up to 11"):
        pipeline.step(*batch(SHAPE, 3, 12))


def test_helix_with_split_backward_and_travelling_weights(four_ranks: Ranks) -> None:
    """A visiting stage's gradients leave after its last W, not its last I."""
    loss, gradients = oracle()
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(run_split_helix)[:3]:
        assert abs(result[0] - loss) < 1e-12
        found |= result[1]
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-9, name


def run_split_helix() -> tuple[float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(3)
    if mesh is None:
        return None
    whole = build_schedule("helix", ranks=3, layers=4, microbatches=3, travel="attention")
    orders = []
    for order in whole.ranks:
        late = tuple(action.sibling(Pass.W) for action in order if action.kind is Pass.B)
        orders.append(tuple(a.sibling(Pass.I) if a.kind is Pass.B else a for a in order) + late)
    pipeline = Pipeline(Decoder(SHAPE), Schedule(whole.stages, tuple(orders)), mesh, dtype=torch.float64, timeout_s=30)
    loss = pipeline.step(*batch(SHAPE, 3, 12))
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}
