"""A spread vocabulary over dp, cp and tp, with what a head may have: z-loss, weights of targets, softcap, bias, transform."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_logits
from ranks import Ranks
from spreading import spread
from test_mesh import Found, assembled, device_mesh, sized
from test_spread_vocabulary import check_gradients, joined
from torch import Tensor
from values import initial_values

import helixpipe as hp

LENGTH, Z = 24, 0.05
SHAPES: list[dict[str, Any]] = [
    {"tied": True, "kv_heads": 2},
    {"tied": True, "head_softcap": 0.3, "head_transform": True, "bias": True, "embed_norm": True},
    {"positions": "learned", "context": LENGTH, "norm": "layer", "mlp": "gelu", "bias": True, "embed_scale": 3.0},
    {"causal": False, "head_softcap": 0.3, "norm_offset": True, "norms": "both"},
]


@dataclass(frozen=True)
class Case:
    mesh: tuple[tuple[str, int], ...]
    family: str
    shape: int
    chunk: int = 0
    recompute: str = "selective"
    segments: int = 0
    moved: int = 0
    z_loss: float = 0.0
    weighs: bool = False

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.mesh)
        return f"{mesh}-{self.family}-shape{self.shape}-chunk{self.chunk}-{self.recompute}-moved{self.moved}"

    @property
    def whole(self) -> hp.ModelShape:
        return hp.ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19, **SHAPES[self.shape])

    def batch(self) -> dict[str, Tensor]:
        sequences = 3 * dict(self.mesh).get("dp", 1)
        found = dict(zip(("tokens", "targets"), batch(self.whole, sequences, LENGTH), strict=True))
        if self.weighs:
            weights = torch.randn(sequences, LENGTH, generator=torch.Generator().manual_seed(3)) * 3
            weights[:, 5] = 0
            found["weights"] = weights
        return found


CASES = [
    Case(sized(pp=2, tp=2), "1f1b", 0, 8, z_loss=Z),
    Case(sized(pp=2, tp=2), "seq1f1b", 2, 4, "none", segments=3, weighs=True),
    Case(sized(pp=2, cp=2), "zb_h1", 1, 0, "full", weighs=True, z_loss=Z),
    Case(sized(pp=2, cp=2), "seq1f1b", 0, 0, segments=3, moved=1),
    Case(sized(pp=2, dp=2), "zb_h1", 0, 4, moved=1, z_loss=Z),
    Case(sized(pp=2, dp=2), "1f1b", 3, 8, "none", weighs=True),
    Case(sized(pp=1, dp=2, tp=2), "1f1b", 1, 0, "selective"),
    Case(sized(pp=2, tp=2), "helix", 3, 0, "full", moved=1),
]


def run_case(case: Case) -> tuple[Found, list[float]]:
    ranks = dict(case.mesh)["pp"]
    options: dict[str, Any] = {"segments": case.segments} if case.segments else {}
    schedule = spread(hp.build_schedule(case.family, ranks=ranks, layers=2, microbatches=3, **options), 2, case.moved)
    pipeline = hp.Pipeline(
        hp.Decoder(case.whole, head_chunk=case.chunk, z_loss=case.z_loss), schedule, device_mesh(case.mesh),
        dtype=torch.float64, recompute=case.recompute, timeout_s=30, segment_lengths=(12, 4, 8) if options else None,
    )  # fmt: skip
    data = case.batch()
    loss, evaluated = pipeline.step(**data), pipeline.losses(**data)
    assert pipeline._ledger.bytes == 0
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    norm = pipeline.clip_gradients(math.inf)
    pipeline.close()
    found = Found(pipeline.mesh.here, loss, evaluated.mean, norm, gradients, cuts)
    return found, [bucket.total for bucket in evaluated.by_position]


@functools.cache
def truth(case: Case) -> tuple[float, float, dict[str, Tensor]]:
    """The loss, the sum of all that is in the bucket of positions 4 to 7, and gradients, the z-loss's share in them."""
    data, shape = case.batch(), case.whole
    w = {name: value.double().requires_grad_() for name, value in initial_values(shape).items()}
    logits = plain_logits(shape, w, data["tokens"])
    counts = (data["targets"] != -100) * data.get("weights", torch.ones(())).double()
    each = F.cross_entropy(logits.mT, data["targets"], ignore_index=-100, reduction="none") * counts
    counted = int((data["targets"] != -100).sum())
    z_loss = (case.z_loss * logits.logsumexp(-1).square() * counts).sum() / counted
    loss = each.sum() / counted
    gradients = torch.autograd.grad(loss + z_loss, list(w.values()))
    return float(loss.detach()), float(each[:, 4:8].detach().sum()), dict(zip(w, gradients, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(four_ranks: Ranks, case: Case) -> None:
    loss, of_some, gradients = truth(case)
    results = four_ranks.run(run_case, case)
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    for result, by_position in results:
        assert abs(result.loss - loss) < 1e-12
        assert abs(result.evaluated - loss) < 1e-12
        assert abs(by_position[3] - of_some) < 1e-11
        assert abs(result.norm - norm) < 1e-12 * max(1, norm)
    check_gradients(joined(assembled([found for found, _ in results])), gradients)
