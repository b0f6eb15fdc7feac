"""What is frozen costs no gradient, no optimizer, no message home: predicted, and so in a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import batch
from ranks import Ranks, mesh_of

import helixpipe as hp
from helixpipe.config import TrainConfig
from helixpipe.mesh import deal
from helixpipe.parts.work import Keeping
from helixpipe.predict.standing import standing_bytes
from helixpipe.schedule.program import Kind
from helixpipe.train.optimizer import Optimizer

SHAPE = hp.ModelShape(layers=4, hidden=16, heads=2, ffn=32, vocabulary=20, tied=True)
HALF = replace(SHAPE, frozen=("embed.*", "layers.[01].*"))
DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.float64: 8}


def schedule_of(travel: str, ranks: int = 2) -> hp.Schedule:
    return hp.build_schedule("helix", ranks=ranks, layers=4, microbatches=4, travel=travel)


@pytest.mark.parametrize("family", ["helix", "1f1b"])
def test_weights_travel_and_no_gradient_of_what_is_frozen_comes_home(family: str) -> None:
    """Of helix those of attention travel, of 1f1b the table of a tied head."""
    schedule = schedule_of("qkv") if family == "helix" else hp.build_schedule("1f1b", ranks=2, layers=4, microbatches=4)
    whole, half = (hp.lower(schedule, shape, hp.Batch(1, (8,))) for shape in (SHAPE, HALF))
    there = [[m.names for m in program.messages if m.kind is Kind.WEIGHTS] for program in (whole, half)]
    home = [[m.names for m in program.messages if m.kind is Kind.WEIGHT_GRADIENTS] for program in (whole, half)]
    assert there[0] == there[1]
    trained = [tuple(name for name in names if HALF.trains(name)) for names in home[0]]
    assert home[1] == [names for names in trained if names]
    assert len(home[1]) < len(home[0])
    for message in half.messages:
        assert len(message.names) == len(message.shapes)


def test_nothing_frozen_is_the_same_program() -> None:
    texts = [
        [f"{m} {m.names} {m.shapes}" for m in hp.lower(schedule_of("qkv"), shape, hp.Batch(1, (8,))).messages]
        for shape in (SHAPE, replace(SHAPE, frozen=()))
    ]
    assert texts[0] == texts[1]


def test_replicas_neither_sum_nor_send_what_is_frozen() -> None:
    """In proportion to what is trained: links have no latency here."""
    link = hp.Link("free of latency", 1e9, 0.0, "made up")

    def reduction_s(shape: hp.ModelShape, optimizer: str) -> float:
        setting = hp.Setting(shape, 64, link=link, data_parallel=2, optimizer=optimizer)
        return hp.estimate(hp.build_schedule("1f1b", ranks=1, layers=4, microbatches=2), setting).reduction_s

    count = SHAPE.parameter_count
    trained = count - sum(size for name, size in HALF.parameter_elements(all_parts()).items() if not HALF.trains(name))
    for optimizer in ("replicated", "sharded"):
        whole, half = reduction_s(SHAPE, optimizer), reduction_s(HALF, optimizer)
        assert half == pytest.approx(whole * trained / count)


def all_parts() -> tuple[hp.Part, ...]:
    return tuple(part for stage in schedule_of("none").stages for part in stage.parts)


def run(dtype: torch.dtype, frozen: tuple[str, ...], travel: str) -> tuple[int, int, int] | None:
    """On a rank of two: bytes of weights, gradients and moments after a step, as they stand there."""
    mesh = mesh_of(2)
    if mesh is None:
        return None
    shape = replace(SHAPE, frozen=frozen, tied=False)
    pipeline = hp.Pipeline(hp.Decoder(shape), schedule_of(travel), mesh, dtype=dtype, timeout_s=30)
    held: list[int] = []
    weights, end = pipeline._weights, pipeline._weights.end

    def at_the_end() -> None:
        tensors = {id(p): p for p in (*weights.masters.values(), *weights._working.values())}
        held.append(sum({p.data_ptr(): p.untyped_storage().nbytes() for p in tensors.values()}.values()))
        end()

    weights.end = at_the_end  # type: ignore[method-assign]
    pipeline.step(*batch(shape, 4, 8))
    optimizer = Optimizer(pipeline.parameters, TrainConfig())
    optimizer.step(0)
    moments = sum(t.nbytes for name, t in optimizer.state(1).items() if name.startswith("optimizer."))
    gradients = sum(p.grad.nbytes for p in pipeline.parameters.values() if p.grad is not None)
    pipeline.close()
    return held[0], gradients, moments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [(), HALF.frozen, ("*",)])
def test_standing_bytes_are_those_of_a_run(four_ranks: Ranks, dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    shape = replace(SHAPE, frozen=frozen, tied=False)
    keeping = Keeping("selective", DTYPES[dtype])
    predicted = standing_bytes(schedule_of("none"), shape, keeping)
    for rank, found in enumerate(four_ranks.run(run, dtype, frozen, "none")[:2]):
        assert found == tuple(predicted[rank])


def test_replicas_share_the_state_of_what_is_trained() -> None:
    schedule = hp.build_schedule("1f1b", ranks=1, layers=4, microbatches=2)
    (standing,) = standing_bytes(schedule, HALF, Keeping("selective", 2), optimizer_shards=3)
    trained = {name: size for name, size in HALF.parameter_elements(all_parts()).items() if HALF.trains(name)}
    fullest = max(sum(trained[name] for name in names) for names in deal(trained, 3))
    frozen = SHAPE.parameter_count - sum(trained.values())
    assert standing.optimizer_bytes == 8 * fullest
    assert standing.gradients_bytes == 4 * sum(trained.values())
    assert standing.weights_bytes == 6 * sum(trained.values()) + 2 * frozen
