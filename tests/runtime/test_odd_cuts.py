"""Stages that no family makes: cut anywhere, a value read twice, several layers and a half in one stage."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks, mesh_of

from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.modules import Modules
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.weights import Weights
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage, cut

SHAPE = ModelShape(layers=3, hidden=16, heads=2, ffn=32, vocabulary=17, tied=True)
CUTS = {
    # x of layer 1 is read by a later chunk of the stage that makes it and by the next stage
    "a layer and a half": ["norm.0", "attn.1"],
    "in the middle of every layer": ["attn.0", "attn.1", "attn.2"],
    "every part alone": [str(part) for part in chain(SHAPE.layers)[1:]],
}


def schedule_of(before: Sequence[str], ranks: int = 2, microbatches: int = 2, segments: int = 1) -> Schedule:
    """All forward, then all backward, a segment through all stages and then the next; stages on the ranks in turn."""
    pieces = cut(chain(SHAPE.layers), [Part.parse(text) for text in before])
    forward = [
        Action(s, Pass.F, mb, seg) for mb in range(microbatches) for seg in range(segments) for s in range(len(pieces))
    ]
    backward = [Action(s, Pass.B, mb, seg) for s, _, mb, seg in reversed(forward)]
    orders = tuple(tuple(action for action in forward + backward if action.stage % ranks == r) for r in range(ranks))
    return Schedule(tuple(map(Stage, pieces)), orders)


def run_cut(name: str, recompute: str, segments: int) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(2)
    if mesh is None:
        return None
    pipeline = Pipeline(
        Decoder(SHAPE), schedule_of(CUTS[name], segments=segments), mesh, dtype=torch.float64, recompute=recompute,
        timeout_s=30, segment_lengths=[5, 3] if segments == 2 else None,
    )  # fmt: skip
    loss = pipeline.step(*batch(SHAPE, 2, 8))
    evaluated = pipeline.evaluate(*batch(SHAPE, 2, 8))
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("segments", [1, 2])
def test_gradients(four_ranks: Ranks, name: str, recompute: str, segments: int) -> None:
    holds(four_ranks.run(run_cut, name, recompute, segments)[:2])


def holds(results: Sequence[tuple[float, float, dict[str, torch.Tensor]]]) -> None:
    """Every rank's losses, of a step and of an evaluation, and gradients are plain autograd's."""
    loss, gradients = plain_step(SHAPE, *batch(SHAPE, 2, 8))
    found: dict[str, torch.Tensor] = {}
    for stepped, evaluated, mine in results:
        assert abs(stepped - loss) < 1e-12
        assert abs(evaluated - loss) < 1e-12
        found |= mine
    for parameter, gradient in gradients.items():
        error = (found[parameter] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{parameter}: {error:.1e}"


def run_shared(recompute: str) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    """Rank 1 owns everything; a micro-batch is on each rank."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    first, last = cut(chain(SHAPE.layers), [Part("head", SHAPE.layers)])
    passes = ((0, Pass.F), (1, Pass.F), (1, Pass.B), (0, Pass.B))
    orders = tuple(tuple(Action(s, kind, mb) for s, kind in passes) for mb in range(2))
    schedule = Schedule((Stage(first, home=1), Stage(last, home=1)), orders)
    pipeline = Pipeline(Decoder(SHAPE), schedule, mesh, dtype=torch.float64, recompute=recompute, timeout_s=30)
    loss = pipeline.step(*batch(SHAPE, 2, 8))
    evaluated = pipeline.evaluate(*batch(SHAPE, 2, 8))
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_table_that_two_visiting_stages_share_stays_until_both_are_done(four_ranks: Ranks, recompute: str) -> None:
    """The head is done first, and the embedding recomputes after that."""
    holds(four_ranks.run(run_shared, recompute)[:2])


def test_a_value_is_read_by_a_later_chunk_and_by_another_stage() -> None:
    """So that the first cut above is what it says."""
    schedule = schedule_of(CUTS["a layer and a half"])
    first, second = chunks(schedule.stages[1], whole=False)
    (shared,) = [value for value in first.makes if str(value) == "x.1"]
    assert shared in second.reads
    assert shared in schedule.stages[2].reads


def test_weights_that_left_are_no_parameters_any_more() -> None:
    """Guards against counting an activation as a weight once it has the address of weights that travelled on."""
    schedule = build_schedule("helix", ranks=2, layers=3, microbatches=2, travel="attention")
    weights = Weights(Modules(Decoder(SHAPE), schedule, 0, torch.device("cpu"), torch.float32))
    name = "layers.1.qkv.q.weight"
    assert name not in weights.masters
    came = torch.randn(16, 16)
    pointer = came.untyped_storage().data_ptr()
    weights.arrive([name], [came])
    assert weights.is_parameter(pointer)
    weights.leave([name])
    assert not weights.is_parameter(pointer)


def test_what_visits_is_on_the_ledger_while_it_is_here() -> None:
    """Weights from their arrival, a gradient from the first that is made; right before it leaves it is in transit."""
    schedule = build_schedule("helix", ranks=2, layers=3, microbatches=2, travel="attention")
    weights = Weights(Modules(Decoder(SHAPE), schedule, 0, torch.device("cpu"), torch.float32))
    name, nbytes = "layers.1.qkv.q.weight", 16 * 16 * 4
    working, ledger = weights._working[name], weights.ledger
    weights.arrive([name], [torch.randn(16, 16)])
    weights.arrive([name], [torch.randn(16, 16)])  # for another stage: the same weights
    assert ledger.held == (nbytes, 0, 0)
    for _ in range(2):  # the second is added to the first
        working.grad = torch.ones(16, 16)
        weights.came(name, working)
        assert ledger.held == (2 * nbytes, 0, 0)
    weights.pack([name])
    assert ledger.held == (nbytes, nbytes, 0)  # the other stage needs the weights still
    (gradient,) = weights.leave([name])
    assert gradient.unique().tolist() == [2.0]
    assert ledger.held == (nbytes, 0, 0)
    weights.pack([name])
    assert ledger.held == (0, 0, 0)
    weights.leave([name])
    owned = next(iter(weights.masters))
    weights._working[owned].grad = torch.ones_like(weights._working[owned])
    weights.came(owned, weights._working[owned])
    assert ledger.held == (0, 0, 0)  # what is owned stands, and is not counted here
