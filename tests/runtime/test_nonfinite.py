"""The first value that is not finite is found in its part, whichever layout runs it, and looking for it changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime import tape
from helixpipe.runtime.nonfinite import is_finite
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=4, hidden=16, heads=4, kv_heads=4, ffn=24, vocabulary=19)
LENGTH = 16


@dataclass(frozen=True)
class Case:
    """Where something is put that is not finite, in a layout."""

    part: str
    way: str
    microbatch: int = 1
    segment: int = 0
    family: str = "1f1b"
    options: dict[str, Any] = field(default_factory=dict)
    mesh: tuple[str, ...] = ("pp",)
    recompute: str = "selective"
    chunk: int = 0

    def __str__(self) -> str:
        layout = "-".join((self.family, *self.mesh, *map(str, self.options.values()), self.recompute))
        return f"{self.part}-{self.way}-{layout}"


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


@contextmanager
def spoiled(case: Case, ranks: list[int]) -> Iterator[None]:
    """Within it the part gives what is not finite, or its backward does, in one segment of one micro-batch; `ranks`: where."""
    original, target = tape.run_part, Part.parse(case.part)

    def run_part(part: Part, module: Any, inputs: Sequence[Tensor], feed: tape.Feed, *more: Any) -> Sequence[Tensor]:
        here = part == target and (feed.microbatch, feed.segment) == (case.microbatch, case.segment)
        if here:
            ranks.append(dist.get_rank() if dist.is_initialized() else 0)
        if here and case.way == "backward":
            inputs = [_Spoiled.apply(each) for each in inputs]  # type: ignore[no-untyped-call]
        made = original(part, module, inputs, feed, *more)
        return [each * float("nan") for each in made] if here and case.way == "forward" else made

    tape.run_part = run_part
    try:
        yield
    finally:
        tape.run_part = original


@functools.cache
def device_mesh(names: tuple[str, ...]) -> DeviceMesh | None:
    return None if len(names) == 1 else init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def pipeline_of(case: Case) -> Pipeline:
    ranks = {("pp",): 4, ("cp", "tp"): 1}.get(case.mesh, 2)
    schedule = build_schedule(case.family, ranks=ranks, layers=4, microbatches=4, **case.options)
    model = Decoder(SHAPE, mlp_chunk=case.chunk, head_chunk=case.chunk)
    return Pipeline(model, schedule, device_mesh(case.mesh), recompute=case.recompute, timeout_s=30)


def gradients(pipeline: Pipeline) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}


def found(case: Case) -> tuple[str, list[int], bool]:
    """On a rank: what was found, where something was put, and whether a step afterwards is as before to the last bit."""
    pipeline, ranks = pipeline_of(case), list[int]()
    tokens, targets = batch(SHAPE, 4 * pipeline.mesh.shape.dp, LENGTH)
    loss, before = pipeline.step(tokens, targets), gradients(pipeline)
    pipeline.zero_gradients()
    with spoiled(case, ranks):
        spoiled_loss = pipeline.step(tokens, targets)
        norm = pipeline.clip_gradients(1.0)
        assert not torch.isfinite(torch.tensor([spoiled_loss, norm])).all()
        told = pipeline.first_nonfinite(tokens=tokens, targets=targets)
    assert all(p.grad is None for p in pipeline.parameters.values())
    assert pipeline.steps == 2
    same = pipeline.step(tokens, targets) == loss
    after = gradients(pipeline)
    same &= after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    pipeline.close()
    return told, ranks, same


SEGMENTS = {"segments": 2}
HELIX = {"folds": 1}
CASES = [
    Case("mlp.2", "forward"),
    Case("mlp.2", "backward", recompute="none"),
    Case("head.4", "forward", 3, chunk=5),
    Case("head.4", "backward", 0, recompute="full"),
    Case("mlp.3", "backward", 0, recompute="full", chunk=4),
    Case("qkv.1", "forward", 1, 1, "seq1f1b", SEGMENTS),
    Case("attn.0", "forward", 3, 0, "helix", HELIX),
    Case("qkv.3", "backward", 2, 0, "helix", HELIX | {"travel": "attention"}),
    Case("attn.2", "backward", 1, 0, "helix", HELIX | {"travel": "qkv"}, recompute="full"),
    Case("mlp.0", "backward", 1, 0, "zb_h1", recompute="full"),
    Case("proj.3", "forward", 1, mesh=("pp", "dp")),
    Case("norm.2", "backward", 1, mesh=("pp", "tp")),
    Case("attn.1", "backward", 1, 0, "seq1f1b", SEGMENTS, ("pp", "cp")),
    Case("embed", "forward", 2, mesh=("cp", "tp")),
]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_named_by_part_rank_microbatch_and_way(four_ranks: Ranks, case: Case) -> None:
    results = four_ranks.run(found, case)
    rank = min(rank for _, ranks, _ in results for rank in ranks)
    assert all(same for _, _, same in results)
    told = {told for told, _, _ in results}
    assert len(told) == 1
    kind, _, layer = case.part.partition(".")
    what = f"the {kind}" if kind in ("embed", "head") else f"layer {layer}'s {kind}"
    place = [f"{name} {at}" for name, at in zip(case.mesh, divmod(rank, 2), strict=False)]
    where = f"rank {rank} ({', '.join(place)})" if len(case.mesh) > 1 else f"rank {rank}"
    piece = f", segment {case.segment}" if case.family == "seq1f1b" else ""
    assert told == {f"{what}, on {where}, micro-batch {case.microbatch}{piece}, {case.way}"}


def alone(recompute: str = "full") -> tuple[Pipeline, tuple[Tensor, Tensor]]:
    schedule = build_schedule("gpipe", ranks=1, layers=4, microbatches=2)
    return Pipeline(Decoder(SHAPE), schedule, recompute=recompute), batch(SHAPE, 2, LENGTH)


def test_a_weight_that_was_not_finite_before_is_named() -> None:
    pipeline, (tokens, targets) = alone()
    pipeline.parameters["layers.2.mlp.up.weight"].data[3, 4] = float("inf")
    pipeline.step(tokens, targets)
    assert pipeline.first_nonfinite(tokens=tokens, targets=targets) == (
        "layers.2.mlp.up.weight, on rank 0, which was not finite before the step"
    )
    pipeline.close()


def test_a_gradient_of_a_weight_alone_is_named() -> None:
    pipeline, (tokens, targets) = alone()
    end = pipeline._weights.end

    def spoiling() -> None:
        end()
        gradient = pipeline.parameters["layers.1.qkv.k.weight"].grad
        assert gradient is not None
        gradient[0, 0] = float("nan")

    pipeline._weights.end = spoiling  # type: ignore[method-assign]
    pipeline.step(tokens, targets)
    assert (
        pipeline.first_nonfinite(tokens=tokens, targets=targets) == "the gradient of layers.1.qkv.k.weight, on rank 0"
    )
    pipeline.close()


def test_finite_gradients_whose_sum_is_not_are_told_as_a_sum() -> None:
    """x of a layer is read by its norm and its projection."""
    pipeline, (tokens, targets) = alone()
    original, most = tape.run_part, torch.finfo(torch.float32).max

    class Most(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, 0.7 * most)

    def run_part(part: Part, module: Any, inputs: Sequence[Tensor], feed: tape.Feed, *more: Any) -> Sequence[Tensor]:
        if str(part) in ("norm.2", "proj.2"):
            inputs = [Most.apply(each) if i == len(inputs) - 1 else each for i, each in enumerate(inputs)]  # type: ignore[no-untyped-call]
        return original(part, module, inputs, feed, *more)

    tape.run_part = run_part
    try:
        pipeline.step(tokens, targets)
        told = pipeline.first_nonfinite(tokens=tokens, targets=targets)
    finally:
        tape.run_part = original
    pipeline.close()
    assert told == "the sum of the gradients that reach layer 1's mlp, on rank 0, micro-batch 0, backward"


def test_what_does_not_come_again_is_not_found() -> None:
    pipeline, (tokens, targets) = alone("none")
    pipeline.step(tokens, targets)
    assert pipeline.first_nonfinite(tokens=tokens, targets=targets) == ""
    pipeline.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_element_is_looked_at(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    assert is_finite(tensor.long())
    for bad in (float("nan"), float("inf"), float("-inf")):
        tensor[1, 2] = bad
        assert not is_finite(tensor)
