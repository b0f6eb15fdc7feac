"""Bytes the tape keeps, measured by storage, against the formulas of `predict.memory`, within 5%."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from oracle import batch
from ranks import Ranks, mesh_of
from test_gradients import Case
from test_mesh import device_mesh, sized
from test_split_and_segments import Case as SplitCase
from test_split_and_segments import schedule_of as by_hand

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work
from helixpipe.predict.memory import Held, held_bytes
from helixpipe.predict.timeline import Timeline
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower

BASE: dict[str, Any] = {"layers": 4, "hidden": 64, "heads": 4, "ffn": 256, "vocabulary": 64, "mlp": "gelu"}
LENGTH = 64


def measured(case: Case) -> Timeline | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    shape = ModelShape(**(BASE | case.shape))
    schedule = build_schedule(
        case.family, ranks=case.ranks, layers=shape.layers, microbatches=case.microbatches, **case.options
    )
    model = Decoder(shape, mlp_chunk=case.chunk, head_chunk=case.chunk)
    pipeline = Pipeline(model, schedule, mesh, recompute=case.recompute, timeout_s=30)
    pipeline.step(*batch(shape, case.microbatches, LENGTH))
    pipeline.close()
    return pipeline.timeline()


def predicted(case: Case) -> tuple[tuple[Held, ...], ...]:
    shape = ModelShape(**(BASE | case.shape))
    schedule = build_schedule(
        case.family, ranks=case.ranks, layers=shape.layers, microbatches=case.microbatches, **case.options
    )
    program = lower(schedule, shape, Batch(1, (LENGTH,)))
    return held_bytes(program, Keeping(case.recompute, 4, case.chunk, case.chunk))


CASES = [
    Case(ranks, 4, "helix", {"travel": travel}, recompute, chunk, {"norm": norm})
    for ranks in (2, 4)
    for travel in ("none", "qkv", "attention")
    for recompute in ("none", "full", "selective")
    for chunk, norm in ((0, "layer"), (16, "rms"))
]
CASES += [Case(2, 4, "1f1b", {}, recompute, chunk) for recompute in ("none", "full", "selective") for chunk in (0, 16)]
CASES += [
    Case(2, 4, "1f1b", {}, recompute, 0, {"qk_norm": True, "norm": norm, "kv_heads": 2})
    for recompute in ("none", "selective")
    for norm in ("rms", "layer")
]
CASES += [
    Case(2, 4, family, {"opaque": (0, 1, 2, 3)}, recompute, 0, {"norm": "layer"})
    for family in ("1f1b", "zb_h1")
    for recompute in ("none", "full")
]

# what other architectures have: norms elsewhere, a norm or a scale behind the table, other heads and gates
GEMMA = {"norms": "both", "norm_offset": True, "embed_scale": 8.0, "mlp": "geglu_tanh", "head_softcap": 5.0}
OLMO = {"norms": "after", "qk_norm": True, "qk_norm_over": "width", "mlp": "swiglu"}
BERT = {
    "norm": "layer",
    "norm_bias": False,
    "embed_norm": True,
    "mlp": "geglu",
    "head_transform": True,
    "causal": False,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("1f1b", {}), ("zb_h1", {}), ("helix", {"travel": "qkv"}), ("helix", {"travel": "attention"}),
    ("1f1b", {"opaque": (0, 1, 2, 3)}),
]  # fmt: skip
CASES += [
    Case(2, 4, family, options, recompute, 16 * ((i + j) % 2), shape)
    for i, (family, options) in enumerate(FAMILIES)
    for j, shape in enumerate((GEMMA, OLMO, BERT))
    for recompute in ("none", ("full", "selective")[(i + j) % 2])
]
# a table that visits the head's rank: its gradient comes with the backward, or with the W
CASES += [
    Case(2, 4, family, {}, recompute, chunk, {"tied": True, "vocabulary": 640})
    for family in ("1f1b", "zb_h1")
    for recompute, chunk in (("none", 0), ("none", 16), ("selective", 0))
]
# a value that goes to all ranks, whose gradients come from each; and what joins those of all ranks
CASES += [
    Case(ranks, 4, family, {"vocabulary": "spread"}, recompute, chunk, {"vocabulary": 640, **more})
    for ranks, family, recompute, chunk, more in (
        (4, "1f1b", "none", 0, {"tied": True}), (4, "1f1b", "selective", 0, {}), (4, "1f1b", "full", 16, {"embed_norm": True}),
        (2, "zb_h1", "none", 0, {"head_transform": True, "head_softcap": 5.0}), (2, "helix", "selective", 16, {"embed_scale": 8.0}),
    )
]  # fmt: skip
# here x and what no norm made of it wait on the same rank: one tensor
CASES += [
    Case(1, 4, "helix", {"travel": "qkv", "folds": 1}, recompute, 16, OLMO) for recompute in ("full", "selective")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_kept_equal_the_formula(four_ranks: Ranks, case: Case) -> None:
    timeline = four_ranks.run(measured, case)[0]
    for rank, expected in enumerate(predicted(case)):
        points = timeline.memory[rank]
        held = [point.kept_bytes for point in points[1::2]]
        ended = [each.left_bytes for each in expected]
        largest = max(ended)
        assert held[-1] == 0
        assert max(held) == pytest.approx(largest, rel=0.05)
        assert held == pytest.approx(ended, abs=0.05 * largest)
        high = max(each.kept_bytes + each.workspace_bytes for each in expected)
        assert most(timeline, rank) == pytest.approx(high, rel=0.05)


@pytest.mark.parametrize("frozen", [("*.qkv.*",), ("*.proj.*", "*.qkv.k.*")], ids=str)
def test_frozen_weights_that_visit_stay_until_the_step_ends(four_ranks: Ranks, frozen: tuple[str, ...]) -> None:
    """Nothing of theirs goes home, so nothing says earlier that they are not needed any more."""
    case = Case(2, 4, "helix", {"travel": "attention"}, "selective", 0, {"frozen": frozen})
    timeline = four_ranks.run(measured, case)[0]
    for rank, expected in enumerate(predicted(case)):
        held, ended = [p.kept_bytes for p in timeline.memory[rank][1::2]], [each.left_bytes for each in expected]
        assert held == pytest.approx(ended, abs=0.05 * max(ended))
        assert held[-1] == ended[-1] > 0


def most(timeline: Timeline, rank: int) -> int:
    """Kept and workspace; what is in transit depends on clocks."""
    return max(point.kept_bytes + point.workspace_bytes for point in timeline.memory[rank])


def measured_by_hand(case: SplitCase) -> Timeline | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    model = Decoder(SHAPE, mlp_chunk=case.chunk, head_chunk=case.chunk)
    lengths = SEGMENTS[case.segments]
    pipeline = Pipeline(model, by_hand(case), mesh, recompute=case.recompute, timeout_s=30, segment_lengths=lengths)
    pipeline.step(*batch(SHAPE, 3, sum(lengths)))
    pipeline.close()
    return pipeline.timeline()


SHAPE = ModelShape(**(BASE | {"kv_heads": 2, "norm": "layer"}))
SEGMENTS = {1: (64,), 3: (40, 16, 8)}
SPLIT_CASES = [
    SplitCase(2, segments, backward, recompute)
    for segments in (1, 3)
    for backward in ("B", "IW", "I..W", "RB")
    for recompute in ("none", "full", "selective")
]


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_bytes_kept_with_segments_and_split_backward(four_ranks: Ranks, case: SplitCase) -> None:
    timeline = four_ranks.run(measured_by_hand, case)[0]
    program = lower(by_hand(case), SHAPE, Batch(1, SEGMENTS[case.segments]))
    for rank, expected in enumerate(held_bytes(program, Keeping(case.recompute))):
        held = [point.kept_bytes for point in timeline.memory[rank][1::2]]
        largest = max(each.kept_bytes + each.workspace_bytes for each in expected)
        assert held == pytest.approx([each.left_bytes for each in expected], abs=0.05 * largest)
        assert most(timeline, rank) == pytest.approx(largest, rel=0.05)


def transient(timeline: Timeline, rank: int, stages: set[int]) -> int:
    """The most that a backward of these stages held beyond what was kept when it ended."""
    points = timeline.memory[rank]
    return max(
        points[2 * i].kept_bytes + points[2 * i].workspace_bytes - points[2 * i + 1].kept_bytes
        for i, span in enumerate(timeline.spans[rank])
        if span.action.kind == "B" and span.action.stage in stages
    )


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_chunked_mlp_and_head_against_unchunked(four_ranks: Ranks, recompute: str) -> None:
    """With the attention block travelling, even stages are the MLP alone (the last with the head)."""
    case = Case(2, 2, "helix", {"travel": "attention"}, recompute, 0, {"vocabulary": 512, "ffn": 512})
    whole = four_ranks.run(measured, case)[0]
    sliced = four_ranks.run(measured, replace(case, chunk=8))[0]
    mlps = {2, 4, 6, 8}
    for rank in range(2):
        assert most(sliced, rank) < most(whole, rank)
        assert transient(sliced, rank, mlps) < 0.5 * transient(whole, rank, mlps)


def test_selective_by_hand() -> None:
    """The paper's table, per layer and micro-batch in b*s*h elements, for MLP 4h and as many kv heads as heads."""
    from helixpipe.predict.keeping import kept
    from helixpipe.schedule.chunks import chunks

    shape = ModelShape(**(BASE | {"norm": "layer"}))
    unit = LENGTH * shape.hidden * 4
    lse = LENGTH * shape.heads * 4
    for travel, elements in (("none", 6), ("qkv", 4), ("attention", 3)):
        schedule = build_schedule("helix", ranks=4, layers=4, microbatches=8, travel=travel)
        found = 0
        for stage in schedule.stages[2:4]:  # the serial block between layers 0 and 1, and attention of layer 1
            for chunk in chunks(stage, whole=False):
                found += sum(kept(chunk, Work(shape, Batch(1, (LENGTH,)), 0, Keeping("selective"))).values())
        assert found == elements * unit + lse
    one = build_schedule("1f1b", ranks=1, layers=4, microbatches=1)
    none = sum(kept(chunks(one.stages[0], True)[0], Work(shape, Batch(1, (LENGTH,)), 0, Keeping("none"))).values())
    per_layer = 12 * unit + lse + 4 * LENGTH * 4  # and two norms' mean and deviation
    head = 2 * unit + LENGTH * shape.vocabulary * 4 + 2 * LENGTH * 4
    assert none == 4 * per_layer + head


SHARED = (24, 20, 20)


def segments_shared(method: str, recompute: str) -> list[int]:
    """On a rank: bytes kept after every action, of segments that two ranks share."""
    shape = ModelShape(**BASE)
    schedule = build_schedule("seq1f1b", ranks=1, layers=4, microbatches=2, segments=3)
    pipeline = Pipeline(
        Decoder(shape), schedule, device_mesh(sized(dp=2, cp=2)), recompute=recompute, timeout_s=30,
        segment_lengths=SHARED, context_method=method,
    )  # fmt: skip
    pipeline.step(*batch(shape, 4, sum(SHARED)))
    pipeline.close()
    return [point.kept_bytes for point in pipeline.timeline().memory[0][1::2]]


@pytest.mark.parametrize(("method", "recompute"), [("ring", "none"), ("ring", "selective"), ("ulysses", "selective")])
def test_keys_and_values_of_shared_segments_keep_themselves_alone(
    four_ranks: Ranks, method: str, recompute: str
) -> None:
    """Guards against views: with Ulysses q, k and v come in one storage, and every kept k, v kept the q beside it."""
    shape = ModelShape(**BASE)
    schedule = build_schedule("seq1f1b", ranks=1, layers=4, microbatches=2, segments=3)
    program = lower(schedule, shape, Batch(1, tuple(length // 2 for length in SHARED)))
    expected = [each.left_bytes for each in held_bytes(program, Keeping(recompute))[0]]
    for held in four_ranks.run(segments_shared, method, recompute):
        assert held == pytest.approx(expected, rel=0.02)
