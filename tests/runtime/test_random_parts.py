"""Parts that draw random numbers: the same ones in a forward and its recompute, on any rank, in any schedule.

Guards against a recompute that draws anew: gradients were off by their own size, and nothing said so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch
from ranks import Ranks, mesh_of
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.parts.part import chain
from helixpipe.runtime.randomness import Stream, may_draw

SHAPE = hp.ModelShape(layers=4, hidden=16, heads=4, ffn=24, vocabulary=19)
LENGTH, MICROBATCHES, SEED, SHARE = 12, 4, 7, 0.3
SEGMENTS = {1: (12,), 3: (6, 1, 5)}


class Dropped(nn.Module):
    """An MLP with dropout on what it adds."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.drop = mlp, nn.Dropout(SHARE)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.drop(self.mlp(y) - y)  # type: ignore[no-any-return]


class DroppedModel:
    """A decoder with Dropped in every layer; names stay those of the decoder."""

    def __init__(self) -> None:
        self.shape = _Shape(**vars(SHAPE))
        self._decoder = hp.Decoder(SHAPE)

    def part(self, part: hp.Part) -> nn.Module:
        module = self._decoder.part(part)
        return Dropped(module) if part.kind == "mlp" else module


class _Shape(hp.ModelShape):
    def parameters(self, part: hp.Part) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"mlp.{name}": size for name, size in found.items()} if part.kind == "mlp" else found


@dataclass(frozen=True)
class Case:
    family: str
    ranks: int
    recompute: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> tuple[int, ...]:
        return SEGMENTS[self.options.get("segments", 1)]

    def __str__(self) -> str:
        return "-".join([self.family, f"p{self.ranks}", self.recompute, *map(str, self.options.values())])


Found = tuple[float, float, dict[str, Tensor]]


def run_case(case: Case) -> Found | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    torch.manual_seed(SEED)
    schedule = hp.build_schedule(
        case.family, ranks=case.ranks, layers=SHAPE.layers, microbatches=MICROBATCHES, **case.options
    )
    pipeline = hp.Pipeline(
        DroppedModel(), schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30,
        segment_lengths=case.lengths,
    )  # fmt: skip
    before = torch.get_rng_state()
    loss = pipeline.step(*batch(SHAPE, MICROBATCHES, LENGTH))
    assert torch.equal(torch.get_rng_state(), before), "what a caller draws does not depend on the pipeline"
    evaluated = pipeline.evaluate(*batch(SHAPE, MICROBATCHES, LENGTH))
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


@functools.cache
def oracle(lengths: tuple[int, ...]) -> Found:
    """Plain autograd over whole sequences, one after another; dropout by masks of the documented streams."""
    model = DroppedModel()
    modules = {part: model.part(part).double() for part in chain(SHAPE.layers)}
    parameters = {
        model.shape.parameter_name(part, name): parameter
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    tokens, targets = batch(SHAPE, MICROBATCHES, LENGTH)

    def loss_of(mb: int, drops: bool) -> Tensor:
        x = modules[hp.Part("embed", 0)](tokens[mb : mb + 1], 0)
        for layer in range(SHAPE.layers):
            n = modules[hp.Part("norm", layer)](x)
            q, k, v = (t.transpose(1, 2) for t in modules[hp.Part("qkv", layer)](n, 0))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            y = modules[hp.Part("proj", layer)](o, x)
            mlp = hp.Part("mlp", layer)
            masks = []
            for segment, length in enumerate(lengths):
                with Stream(SEED, 0, mb, segment, (0, 0)).of(mlp, tokens.device):
                    masks.append(F.dropout(torch.ones(1, length, SHAPE.hidden, dtype=x.dtype), SHARE, drops))
            x = y + (modules[mlp].mlp(y) - y) * torch.cat(masks, 1)
        head = modules[hp.Part("head", SHAPE.layers)]
        logits = F.linear(head.norm(x), head.output.weight).flatten(0, 1)
        return F.cross_entropy(logits, targets[mb], ignore_index=-100, reduction="sum")

    counted = int((targets != -100).sum())
    loss, evaluated = (
        torch.stack([loss_of(mb, drops) for mb in range(MICROBATCHES)]).sum() / counted for drops in (True, False)
    )
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), float(evaluated.detach()), dict(zip(parameters, gradients, strict=True))


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("1f1b", {}), ("zb_h1", {}), ("zb_v", {}), ("interleaved", {"stages_per_rank": 2}), ("seq1f1b", {"segments": 3}),
    ("helix", {"travel": "none"}), ("helix", {"travel": "qkv"}), ("helix", {"travel": "attention"}),
]  # fmt: skip
CASES = [
    Case(family, ranks, recompute, options)
    for i, (family, options) in enumerate(FAMILIES)
    for ranks in ((1, 2) if family != "helix" else (2, 3))
    for recompute in ("none", "full", "selective")
    if ranks == 2 or i % 2  # some on one rank and on three
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dropout_changes_with_no_schedule_and_no_policy(four_ranks: Ranks, case: Case) -> None:
    loss, evaluated, gradients = oracle(case.lengths)
    assert abs(loss - evaluated) > 1e-5, "dropout did something"
    found: dict[str, Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert abs(result[1] - evaluated) < 1e-12, "an evaluation drops nothing"
        found |= result[2]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-9, name


def test_every_step_micro_batch_segment_and_part_draws_its_own() -> None:
    streams = [Stream(0, step, mb, seg) for step in (0, 1) for mb in (0, 1) for seg in (0, 1)] + [Stream(1, 0, 0, 0)]
    drawn = set()
    for stream in streams:
        for part in (hp.Part("mlp", 0), hp.Part("mlp", 1)):
            with stream.of(part, torch.device("cpu")):
                drawn.add(float(torch.rand(())))
    assert len(drawn) == 2 * len(streams)


def test_modes_are_as_they_were_after_an_evaluation() -> None:
    pipeline = hp.Pipeline(
        DroppedModel(), hp.build_schedule("1f1b", ranks=1, layers=SHAPE.layers, microbatches=MICROBATCHES)
    )
    frozen = pipeline._weights.modules[hp.Part("mlp", 1)].eval()  # by its owner, and so it stays
    tokens, targets = batch(SHAPE, MICROBATCHES, LENGTH)
    first = pipeline.evaluate(tokens, targets)
    assert pipeline.evaluate(tokens, targets) == first
    for part, module in pipeline._weights.modules.items():
        assert all(inner.training is (module is not frozen) for inner in module.modules()), part
    pipeline.close()


def test_our_own_parts_are_known_to_draw_nothing() -> None:
    """So that they cost no seeding."""
    decoder = hp.Decoder(SHAPE)
    assert not any(may_draw(decoder.part(part)) for part in (*chain(1), hp.Part("block", 0)))
    assert may_draw(Dropped(decoder.part(hp.Part("mlp", 0))))
    assert not may_draw(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
