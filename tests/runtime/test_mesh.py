"""pp x dp x cp x tp on local ranks: loss and gradients are plain autograd's, in float64, on every rank."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.mesh import Place
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

BASE: dict[str, Any] = {"layers": 3, "hidden": 16, "heads": 4, "ffn": 24, "vocabulary": 19}
SHAPES: list[dict[str, Any]] = [
    {"tied": True, "kv_heads": 2},
    {"mlp": "gelu", "norm": "layer", "bias": True, "qkv_bias": True},
    {"tied": True, "positions": "learned", "context": 24, "mlp": "gelu", "bias": True, "kv_heads": 2, "qk_norm": True},
    {"causal": False, "qk_norm": True},
    {"kv_heads": 2, "window": 5, "window_pattern": (True, False)},
    {"window": 9, "window_pattern": (False, True, True), "softcap": 0.05, "attention_scale": 0.4},
    {"causal": False, "window": 4, "kv_heads": 2},
    {"window": 2},
]
LENGTH = 24
FAMILIES: dict[str, dict[str, Any]] = {
    "1f1b": {}, "helix": {"folds": 1, "travel": "qkv"}, "seq1f1b": {"segments": 3}, "zb_h1": {}, "seq1f1b_zb": {"segments": 3},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    mesh: tuple[tuple[str, int], ...]
    family: str = "1f1b"
    shape: int = 0
    recompute: str = "selective"
    method: str = "ring"
    layout: str = "zigzag"
    chunk: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def size(self, name: str) -> int:
        return dict(self.mesh).get(name, 1)

    @property
    def microbatches(self) -> int:
        return 2 if self.family == "helix" or self.size("pp") == 1 else 3

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.mesh)
        return f"{mesh}-{self.family}-shape{self.shape}-{self.recompute}-{self.method}-{self.layout}-chunk{self.chunk}"


@dataclass
class Found:
    """What one rank has after a step."""

    place: Place
    loss: float
    evaluated: float
    norm: float
    gradients: dict[str, torch.Tensor]
    cuts: dict[str, int]


_meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}


def device_mesh(sizes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    if sizes not in _meshes:
        names, counts = zip(*sizes, strict=True)
        _meshes[sizes] = init_device_mesh("cpu", counts, mesh_dim_names=names)
    return _meshes[sizes]


def run_case(case: Case, steps: int = 1) -> Found:
    """On a rank."""
    shape = ModelShape(**(BASE | SHAPES[case.shape]))
    options = FAMILIES[case.family] | case.options
    schedule = build_schedule(case.family, ranks=case.size("pp"), layers=3, microbatches=case.microbatches, **options)
    lengths = (12, 4, 8) if schedule.segments == 3 else None
    pipeline = Pipeline(
        Decoder(shape, mlp_chunk=case.chunk, head_chunk=case.chunk), schedule, device_mesh(case.mesh),
        dtype=torch.float64, recompute=case.recompute, timeout_s=30, segment_lengths=lengths,
        context_method=case.method, layout=case.layout,
    )  # fmt: skip
    data = batch(shape, case.microbatches * case.size("dp"), LENGTH)
    loss = [pipeline.step(*data) for _ in range(steps)][-1]
    evaluated = pipeline.evaluate(*data)
    assert pipeline._ledger.bytes == 0
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    norm = pipeline.clip_gradients(math.inf)
    pipeline.close()
    return Found(pipeline.mesh.here, loss, evaluated, norm, gradients, cuts)


@functools.cache
def oracle(shape: int, sequences: int) -> tuple[float, dict[str, torch.Tensor]]:
    whole = ModelShape(**(BASE | SHAPES[shape]))
    return plain_step(whole, *batch(whole, sequences, LENGTH))


def assembled(results: list[Found]) -> dict[str, torch.Tensor]:
    """Whole gradients; ranks that hold the same must agree bit for bit."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    cuts: dict[str, int] = {}
    for result in results:
        cuts |= result.cuts
        for name, gradient in result.gradients.items():
            seen = pieces.setdefault(name, {})
            at = result.place.tp if name in result.cuts else 0
            assert torch.equal(seen.setdefault(at, gradient), gradient), f"{name} differs between replicas"
    return {
        name: torch.cat([parts[i] for i in sorted(parts)], cuts[name]) if name in cuts else parts[0]
        for name, parts in pieces.items()
    }


def holds(ranks: Ranks, case: Case, steps: int = 1) -> None:
    loss, gradients = oracle(case.shape, case.microbatches * case.size("dp"))
    results = ranks.run(run_case, case, steps)
    norm = float(torch.nn.utils.get_total_norm([g * steps for g in gradients.values()]))
    for result in results:
        assert abs(result.loss - loss) < 1e-12
        assert abs(result.evaluated - loss) < 1e-12
        assert abs(result.norm - norm) < 1e-12 * steps
        assert (result.loss, result.evaluated, result.norm) == (results[0].loss, results[0].evaluated, results[0].norm)
    found = assembled(results)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - steps * gradient).norm() / gradient.norm().clamp_min(1e-30)
        assert error < 1e-9, f"{name}: {error:.1e}"


RECOMPUTE = ("selective", "none", "full")


def sized(**sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())


def data_cases() -> Iterator[Case]:
    for i, family in enumerate(FAMILIES):
        yield Case(sized(pp=2, dp=2), family, i % 3, RECOMPUTE[i % 3])
    yield Case(sized(dp=4), "1f1b", 1)
    yield Case(sized(dp=2, pp=2), "helix", 2)  # another order of dimensions


def context_cases() -> Iterator[Case]:
    ways = [("ring", "zigzag"), ("ring", "striped"), ("ring", "plain"), ("ulysses", "zigzag")]
    pairs = list(itertools.product(("1f1b", "helix", "seq1f1b"), ways))
    pairs += [("zb_h1", ways[0]), ("seq1f1b_zb", ways[3]), ("seq1f1b_zb", ways[0])]
    for i, (family, (method, layout)) in enumerate(pairs):
        yield Case(sized(pp=2, cp=2), family, i % 3, RECOMPUTE[(i + i // 4) % 3], method, layout, 5 * (i % 2))
    yield Case(sized(cp=4), "seq1f1b", 0, layout="striped")
    yield Case(sized(cp=4), "1f1b", 1, "none", "ulysses")
    yield Case(sized(pp=2, cp=2), "helix", 3, "selective", "ring", "striped")
    yield Case(sized(dp=2, cp=2), "seq1f1b", 2, "full")


def tensor_cases() -> Iterator[Case]:
    for i, family in enumerate(FAMILIES):
        yield Case(sized(pp=2, tp=2), family, i % 3, RECOMPUTE[i % 3], chunk=5 * (i % 2))
    yield Case(sized(pp=2, tp=2), "helix", 3, "none")
    yield Case(sized(cp=2, tp=2), "seq1f1b", 0)
    yield Case(sized(cp=2, tp=2), "1f1b", 2, "full", "ulysses")
    yield Case(sized(dp=2, tp=2), "1f1b", 1)


@pytest.mark.parametrize("case", list(data_cases()), ids=str)
def test_data_parallel(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.parametrize("case", list(context_cases()), ids=str)
def test_context_parallel(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


def window_cases() -> Iterator[Case]:
    """Windows shorter and longer than a segment and than a rank's share of it; pure and mixed; both ways."""
    ways = [("ring", "zigzag"), ("ring", "striped"), ("ring", "plain"), ("ulysses", "plain")]
    for i, (family, (method, layout)) in enumerate(itertools.product(("1f1b", "seq1f1b"), ways)):
        yield Case(sized(pp=2, cp=2), family, 4 + i % 2, RECOMPUTE[i % 3], method, layout)
        yield Case(sized(pp=2, cp=2), family, 5 - i % 2, RECOMPUTE[(i + 1) % 3], method, layout)
    yield Case(sized(pp=2, cp=2), "helix", 6, "selective", "ring", "zigzag")
    yield Case(sized(pp=2, cp=2), "seq1f1b_zb", 4, "full", "ring", "plain")
    yield Case(sized(cp=4), "seq1f1b", 7, layout="plain")
    yield Case(sized(cp=4), "seq1f1b", 5, layout="plain")
    yield Case(sized(cp=4), "1f1b", 6, layout="striped")
    yield Case(sized(pp=2, tp=2), "seq1f1b", 4, "full")
    yield Case(sized(pp=2, tp=2), "helix", 5, "none")
    yield Case(sized(cp=2, tp=2), "seq1f1b", 5)


@pytest.mark.parametrize("case", list(window_cases()), ids=str)
def test_windows(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.parametrize("case", list(tensor_cases()), ids=str)
def test_tensor_parallel(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.parametrize("mesh", [sized(pp=2, dp=2), sized(cp=2, tp=2)], ids=str)
def test_gradients_of_several_steps_add_up(four_ranks: Ranks, mesh: tuple[tuple[str, int], ...]) -> None:
    holds(four_ranks, Case(mesh), steps=2)


def of_eight() -> list[Case]:
    meshes = sized(pp=2, cp=2, tp=2), sized(dp=2, cp=2, tp=2)
    return [Case(*each, 2 * (each[1] == "1f1b")) for each in itertools.product(meshes, ("1f1b", "helix", "seq1f1b"))]


def all_hold_on_eight_ranks(cases: list[Case]) -> None:
    ranks = Ranks(8)
    try:
        for case in cases:
            holds(ranks, case)
    finally:
        ranks.close()


def test_three_directions_on_eight_ranks() -> None:
    """One test: the ranks are started once, however tests are spread over processes. Without pp, one family."""
    all_hold_on_eight_ranks(of_eight()[:4])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_three_directions_full_product() -> None:
    """Every family on both meshes: `make test-full`."""
    all_hold_on_eight_ranks(of_eight())
