"""Documents in whole models: loss to 1e-12 and gradients to 1e-9 of plain autograd run document by document, in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import batch
from packing import LENGTH, PACKINGS, SEGMENTS, assert_equal, packed_step
from ranks import Ranks, mesh_of
from test_family_gradients import PER_RANK, RECOMPUTE
from test_mesh import Found, assembled, device_mesh, sized

import helixpipe as hp
from helixpipe.schedule.families import FAMILIES, options
from helixpipe.sequence.wire import Peers

SHAPES: list[dict[str, Any]] = [
    {"kv_heads": 2},
    {"tied": True, "positions": "learned", "context": 24, "mlp": "gelu", "norm": "layer", "bias": True, "kv_heads": 2},
    {"kv_heads": 2, "qk_norm": True, "window": 5, "window_pattern": (True, False), "softcap": 0.05},
    {"causal": False, "tied": True},
    {"causal": False, "window": 4, "kv_heads": 2, "attention_scale": 0.4},
    {"window": 2},
]
CAUSAL = [place for place, shape in enumerate(SHAPES) if shape.get("causal", True)]


@dataclass(frozen=True)
class Case:
    family: str
    mesh: tuple[tuple[str, int], ...]
    """Of four ranks; of pp alone, as many as that."""
    packing: str = "inside"
    shape: int = 0
    segments: int = 1
    recompute: str = "selective"
    microbatch_size: int = 1
    method: str = "ring"
    layout: str = "zigzag"
    chunk: int = 0
    given: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.mesh)
        words = [self.family, mesh, self.packing, f"shape{self.shape}", f"k{self.segments}", self.recompute]
        words += [f"b{self.microbatch_size}", self.method, self.layout, *(str(value) for _, value in self.given)]
        return "-".join(words)

    def size(self, name: str) -> int:
        return dict(self.mesh).get(name, 1)

    @property
    def options(self) -> dict[str, Any]:
        known = options(self.family)
        found: dict[str, Any] = {"segments": self.segments} if "segments" in known else {}
        return found | ({"stages_per_rank": 2} if "stages_per_rank" in known else {}) | dict(self.given)

    @property
    def microbatches(self) -> int:
        if self.family == "dualpipe_v":
            return max(4, 2 * self.size("pp"))
        return 3 if self.segments == 3 and self.family != "helix" else 4

    @property
    def sequences(self) -> int:
        return self.microbatches * self.microbatch_size * self.size("dp")

    @property
    def documents(self) -> tuple[tuple[int, ...], ...]:
        return tuple(itertools.islice(itertools.cycle(PACKINGS[self.packing]), self.sequences))

    @property
    def whole(self) -> hp.ModelShape:
        per_rank = self.options.get("stages_per_rank", PER_RANK.get(self.family, 1))
        layers = max(self.size("pp") * per_rank, 2)
        return hp.ModelShape(layers=layers, hidden=16, heads=4, ffn=24, vocabulary=19, **SHAPES[self.shape])


def run_case(case: Case) -> Found | None:
    """On a rank."""
    is_line = case.mesh == sized(pp=case.size("pp"))
    mesh = mesh_of(case.size("pp")) if is_line else device_mesh(case.mesh)
    if mesh is None:
        return None
    shape = case.whole
    schedule = hp.build_schedule(
        case.family, ranks=case.size("pp"), layers=shape.layers, microbatches=case.microbatches, **case.options
    )
    pipeline = hp.Pipeline(
        hp.Decoder(shape, mlp_chunk=case.chunk, head_chunk=case.chunk), schedule, mesh, dtype=torch.float64,
        recompute=case.recompute, timeout_s=30, segment_lengths=SEGMENTS[case.segments],
        context_method=case.method, layout=case.layout,
    )  # fmt: skip
    data = batch(shape, case.sequences, LENGTH)
    loss = pipeline.step(*data, documents=case.documents)
    assert pipeline._ledger.bytes == 0
    evaluated = pipeline.evaluate(*data, documents=case.documents)
    assert pipeline._ledger.bytes == 0
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    pipeline.close()
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    return Found(pipeline.mesh.here, loss, evaluated, 0.0, gradients, cuts)


@functools.cache
def oracle(shape: hp.ModelShape, documents: tuple[tuple[int, ...], ...]) -> tuple[float, dict[str, torch.Tensor]]:
    return packed_step(shape, *batch(shape, len(documents), LENGTH), documents)


def holds(ranks: Ranks, case: Case) -> None:
    loss, gradients = oracle(case.whole, case.documents)
    results = [result for result in ranks.run(run_case, case) if result is not None]
    for result in results:
        assert abs(result.loss - loss) < 1e-12
        assert abs(result.evaluated - loss) < 1e-12
    assert_equal(assembled(results), gradients)


def product() -> Iterator[Case]:
    for family, ranks, packing in itertools.product(FAMILIES, (1, 2, 3), PACKINGS):
        for segments in (2, 3, 5) if "segments" in options(family) else (1,):
            for shape, recompute in itertools.product(CAUSAL if segments > 1 else range(len(SHAPES)), RECOMPUTE):
                size = 1 + (ranks + segments) % 2
                yield Case(family, sized(pp=ranks), packing, shape, segments, recompute, size)


def covering() -> Iterator[Case]:
    """Every family on one to three ranks; packings, shapes, cuts and policies in turn."""
    packings = tuple(PACKINGS)
    for i, (family, ranks) in enumerate(itertools.product(FAMILIES, (1, 2, 3))):
        segments = (3, 2, 5)[i // 3 % 3] if "segments" in options(family) else 1
        shapes = CAUSAL if segments > 1 else range(len(SHAPES))
        shape = shapes[(i + i // 3) % len(shapes)]
        packing = packings[(i + i // 9) % 3]
        yield Case(family, sized(pp=ranks), packing, shape, segments, RECOMPUTE[(i + i // 3) % 3], 1 + i // 2 % 2)
    for i, travel in enumerate(("none", "qkv", "attention")):
        yield Case("helix", sized(pp=2), packings[i], 3 - i % 2, 1, RECOMPUTE[i], given=(("travel", travel),))


def context_cases() -> Iterator[Case]:
    ways = [("ring", "zigzag"), ("ring", "striped"), ("ring", "plain"), ("ulysses", "plain")]
    packings = tuple(PACKINGS)
    for i, (family, (method, layout)) in enumerate(itertools.product(("1f1b", "seq1f1b", "seq1f1b_zb"), ways)):
        segments = 1 if family == "1f1b" else 3
        shapes = CAUSAL if segments > 1 else range(len(SHAPES))
        shape, recompute = shapes[i % len(shapes)], RECOMPUTE[(i + i // 4) % 3]
        yield Case(
            family, sized(pp=2, cp=2), packings[(i + i // 4) % 3], shape, segments, recompute, 1 + i % 2, method, layout,
            5 * (i % 2),
        )  # fmt: skip
    yield Case("helix", sized(pp=2, cp=2), "inside", 3, method="ring", layout="striped", given=(("travel", "qkv"),))
    yield Case("1f1b", sized(cp=4), "inside", 4, layout="plain")
    yield Case("seq1f1b", sized(dp=2, cp=2), "at", 1, 3, "full")


def tensor_cases() -> Iterator[Case]:
    for i, (family, segments) in enumerate((("1f1b", 1), ("helix", 1), ("seq1f1b", 3), ("zb_v", 1))):
        yield Case(
            family, sized(pp=2, tp=2), tuple(PACKINGS)[i % 3], (1, 3, 2, 0)[i], segments, RECOMPUTE[i % 3], 1 + i % 2
        )
    yield Case("seq1f1b", sized(cp=2, tp=2), "inside", 1, 3)
    yield Case("1f1b", sized(cp=2, tp=2), "at", 2, method="ulysses")


@pytest.mark.parametrize("case", list(covering()), ids=str)
def test_every_family(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.parametrize("case", list(context_cases()), ids=str)
def test_context_parallel(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.parametrize("case", list(tensor_cases()), ids=str)
def test_tensor_parallel(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


def test_documents_change_what_is_computed() -> None:
    """Or the tests above would hold of models that ignore them."""
    for place in (0, 1, 3):
        shape = Case("1f1b", sized(pp=1), shape=place).whole
        losses = {oracle(shape, rows[:4])[0] for rows in (*PACKINGS.values(), ((LENGTH,),) * 4)}
        assert len(losses) == 4


def hops(documents: tuple[int, ...], layout: str) -> int:
    """On a rank: messages of an evaluation of one layer's ring."""
    passed = 0

    def counted(self: Peers, *given: Any, **named: Any) -> Any:
        nonlocal passed
        passed += 1
        return pass_on(self, *given, **named)

    pass_on, Peers.pass_on = Peers.pass_on, counted  # type: ignore[method-assign]
    try:
        shape = hp.ModelShape(layers=1, hidden=16, heads=4, ffn=24, vocabulary=19)
        schedule = hp.build_schedule("1f1b", ranks=1, layers=1, microbatches=1)
        pipeline = hp.Pipeline(hp.Decoder(shape), schedule, device_mesh(sized(cp=4)), timeout_s=30, layout=layout)
        pipeline.evaluate(*batch(shape, 1, LENGTH), documents=[documents])
        pipeline.close()
    finally:
        Peers.pass_on = pass_on  # type: ignore[method-assign]
    return passed


@pytest.mark.parametrize(
    ("documents", "layout", "messages"),
    [
        ((6, 6, 6, 6), "plain", 0),
        ((5, 2, 5, 1, 5, 6), "plain", 1),
        ((3,) * 8, "zigzag", 0),
        ((24,), "plain", 3),
        ((1, 23), "zigzag", 3),
    ],
)
def test_a_ring_ends_where_documents_do(
    four_ranks: Ranks, documents: tuple[int, ...], layout: str, messages: int
) -> None:
    """On every rank alike; a rank's shard is 6 tokens, or twice 3."""
    assert four_ranks.run(hops, documents, layout) == [messages] * 4


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_full_product(four_ranks: Ranks, family: str) -> None:
    """Every packing, shape, cut and policy: `make test-full`."""
    for case in product():
        if case.family == family:
            holds(four_ranks, case)
