"""Micro-batches of one step cut in ways of their own: losses and gradients are plain autograd's, programs come and go."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks, mesh_of
from test_odd_cuts import SHAPE, holds

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.programs import MOST, Programs, Recent, Step
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule

CUTS = ((5, 3), (2, 6))
WINDOW = ModelShape(layers=2, hidden=16, heads=2, ffn=32, vocabulary=17, window=3, window_pattern=(True, False))


def cut_apart(pipeline: Pipeline, cuts: tuple[tuple[int, ...], ...] = CUTS) -> Pipeline:
    """Micro-batch i has cut i, whatever its documents."""
    pipeline._shares.batches = lambda whole, documents: tuple(Batch(whole.microbatch_size, cut) for cut in cuts)
    return pipeline


def run_apart(
    family: str, recompute: str, cp: int = 1
) -> tuple[float, float, dict[str, torch.Tensor], list[tuple[int, ...]]] | None:
    from torch.distributed.device_mesh import init_device_mesh

    if cp > 1:
        mesh = init_device_mesh("cpu", (2, cp), mesh_dim_names=("pp", "cp"))
    elif (mesh := mesh_of(2)) is None:
        return None
    schedule = build_schedule(family, ranks=2, layers=3, microbatches=2, segments=2)
    pipeline = cut_apart(
        Pipeline(
            Decoder(SHAPE), schedule, mesh, dtype=torch.float64, recompute=recompute, timeout_s=30, layout="striped"
        ),
        ((4, 4), (2, 6)) if cp > 1 else CUTS,
    )
    loss = pipeline.step(*batch(SHAPE, 2, 8))
    ran = [each.segment_lengths for each in pipeline.last_program.batches]
    evaluated = pipeline.evaluate(*batch(SHAPE, 2, 8))
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}, ran


@pytest.mark.parametrize("family", ["seq1f1b", "seq1f1b_zb"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_gradients_of_micro_batches_cut_apart(four_ranks: Ranks, family: str, recompute: str) -> None:
    found = four_ranks.run(run_apart, family, recompute)[:2]
    assert all(ran == list(CUTS) for *_, ran in found)
    holds([each[:3] for each in found])


def test_gradients_of_micro_batches_cut_apart_over_a_ring(four_ranks: Ranks) -> None:
    found = four_ranks.run(run_apart, "seq1f1b", "selective", 2)
    assert all(ran == [(2, 2), (1, 3)] for *_, ran in found)
    holds([each[:3] for each in found])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_windows_keep_each_micro_batch_s_own_tails(recompute: str) -> None:
    schedule = build_schedule("seq1f1b", ranks=1, layers=2, microbatches=3, segments=3)
    pipeline = cut_apart(
        Pipeline(Decoder(WINDOW), schedule, dtype=torch.float64, recompute=recompute), ((1, 1, 6), (3, 4, 1), (1, 1, 6))
    )
    loss = pipeline.step(*batch(WINDOW, 3, 8))
    expected, gradients = plain_step(WINDOW, *batch(WINDOW, 3, 8))
    assert abs(loss - expected) < 1e-12
    for name, gradient in gradients.items():
        assert (pipeline.parameters[name].grad - gradient).norm() < 1e-9 * gradient.norm(), name


def test_a_pipeline_cuts_by_documents_and_dp_replicas_by_their_own() -> None:
    schedule = build_schedule("seq1f1b", ranks=1, layers=3, microbatches=2, segments=2)
    shares = Pipeline(Decoder(SHAPE), schedule)._shares
    tokens, targets = batch(SHAPE, 4, 1024)
    plain = shares.batch(tokens, targets)
    assert shares.batches(plain, ()) == (plain, plain)
    one = (1024,)
    first, second = shares.batches(plain, (one, one, (8,) * 128, (512, 512)))
    assert first is plain
    assert second.documents == ((8,) * 128, (512, 512))
    assert second.segment_lengths == (512, 512) != plain.segment_lengths
    given = Pipeline(Decoder(SHAPE), schedule, segment_lengths=(1000, 24))._shares
    assert [each.segment_lengths for each in given.batches(given.batch(tokens, targets), (one, one, (8,) * 128, one))] == [
        (1000, 24), (1000, 24)
    ]  # fmt: skip


def run_arranged(travel: str) -> tuple[float, float, dict[str, torch.Tensor], bool] | None:
    mesh = mesh_of(2)
    if mesh is None:
        return None
    plain = build_schedule("helix", ranks=2, layers=3, microbatches=4, folds=1, travel=travel)

    def arrange(batches: tuple[Batch, ...]) -> Schedule:
        return build_schedule(
            "helix",
            ranks=2,
            layers=3,
            microbatches=4,
            folds=1,
            travel=travel,
            balance="work",
            work=(1.0, 4.0, 2.0, 3.0),
        )

    pipeline = Pipeline(Decoder(SHAPE), plain, mesh, dtype=torch.float64, timeout_s=30, arrange=arrange)
    loss, evaluated = pipeline.step(*batch(SHAPE, 4, 8)), pipeline.evaluate(*batch(SHAPE, 4, 8))
    pipeline.close()
    differs = pipeline.last_program.schedule.ranks != plain.forward_only().ranks
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}, differs


@pytest.mark.parametrize("travel", ["none", "attention"])
def test_gradients_where_micro_batches_take_places_by_cost(four_ranks: Ranks, travel: str) -> None:
    found = four_ranks.run(run_arranged, travel)[:2]
    expected, gradients = plain_step(SHAPE, *batch(SHAPE, 4, 8))
    mine: dict[str, torch.Tensor] = {}
    for loss, evaluated, some, differs in found:
        assert differs
        assert abs(loss - expected) < 1e-12
        assert abs(evaluated - expected) < 1e-12
        mine |= some
    for name, gradient in gradients.items():
        assert (mine[name] - gradient).norm() < 1e-9 * gradient.norm(), name


def test_a_schedule_of_other_stages_is_refused() -> None:
    schedule = build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    other = build_schedule("interleaved", ranks=1, layers=3, microbatches=2, stages_per_rank=3)
    pipeline = Pipeline(Decoder(SHAPE), schedule, arrange=lambda batches: other)
    with pytest.raises(ConfigError, match=r"^arrange: gave a schedule with other stages, or stages on other ranks,"):
        pipeline.step(*batch(SHAPE, 2, 8))
    pipeline.close()


def test_programs_are_kept_by_value_and_the_oldest_goes() -> None:
    schedule = build_schedule("seq1f1b", ranks=1, layers=3, microbatches=2, segments=2)
    pipeline = Pipeline(Decoder(SHAPE), schedule)
    lengths = [(Batch(1, (n, 30 - n)), Batch(1, (2, 28))) for n in range(1, MOST + 2)]
    made = [pipeline.program(each) for each in lengths]
    assert pipeline.program(lengths[-1]) is made[-1]
    assert pipeline.program((Batch(1, (MOST + 1, 29 - MOST)), Batch(1, (2, 28)))) is made[-1]
    assert pipeline.program(lengths[-1], training=False) is not made[-1]
    assert pipeline.program(lengths[0]) is not made[0]
    pipeline.close()


def test_the_most_recent_stay() -> None:
    asked: list[int] = []
    recent: Recent[int, int] = Recent(2)
    for key in (1, 2, 1, 3, 1, 2):
        assert recent.get(key, lambda key=key: asked.append(key) or key) == key
    assert asked == [1, 2, 3, 2]
    assert 1 in recent
    assert 3 not in recent


def test_a_prepared_program_is_what_would_have_been_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, makers = Programs._made, []

    def noted(*args: Any) -> Step:
        makers.append(threading.current_thread() is threading.main_thread())
        return made(*args)

    monkeypatch.setattr(Programs, "_made", noted)
    schedule = build_schedule("seq1f1b", ranks=1, layers=3, microbatches=2, segments=2)
    ahead, plain = (Pipeline(Decoder(SHAPE), schedule) for _ in range(2))
    data, documents = batch(SHAPE, 2, 8), [[4, 4], [8]]
    for _ in range(2):  # the second finds it under way, or there
        ahead.prepare(2, 8, documents)
    losses = [pipeline.step(*data, documents=documents) for pipeline in (ahead, plain)]
    assert losses[0] == losses[1]
    assert makers == [False, True]
    one, other = (pipeline.last_program for pipeline in (ahead, plain))
    assert [list(map(str, order)) for order in one.ranks] == [list(map(str, order)) for order in other.ranks]
    ahead.prepare(2, 8, documents)
    assert len(makers) == 2
    with pytest.raises(ConfigError, match="do not divide into 2 micro-batches"):
        ahead.prepare(3, 8)
    with pytest.raises(ConfigError, match="those of sequence 0 have 9 tokens"):
        ahead.prepare(2, 8, [[4, 5], [8]])
    ahead.close()
    plain.close()
