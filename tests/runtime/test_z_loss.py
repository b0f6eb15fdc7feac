"""z-loss: gradients are those of cross entropy + z * mean(log-sum-exp^2), written out in torch; losses are without it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_logits
from ranks import Ranks
from test_mesh import Found, assembled, device_mesh, sized
from values import initial_values

import helixpipe as hp
from helixpipe.model.cross_entropy import cross_entropy

Z = 0.05
LENGTH = 12


def shape_of(tied: bool) -> hp.ModelShape:
    return hp.ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19, tied=tied)


@functools.cache
def truth(tied: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Cross entropy, z-loss, and the gradients of their sum."""
    shape = shape_of(tied)
    tokens, targets = batch(shape, 3, LENGTH)
    w = {name: value.double().requires_grad_() for name, value in initial_values(shape).items()}
    logits = plain_logits(shape, w, tokens).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    z_loss = Z * logits[targets.flatten() != -100].exp().sum(-1).log().square().mean()
    gradients = torch.autograd.grad(loss + z_loss, list(w.values()))
    return float(loss.detach()), float(z_loss.detach()), dict(zip(w, gradients, strict=True))


CASES: list[tuple[str, tuple[tuple[str, int], ...], dict[str, Any], int, bool, str]] = [
    ("1f1b", sized(pp=2, tp=2), {}, 0, True, "selective"),
    ("seq1f1b", sized(pp=2, cp=2), {"segments": 3}, 4, False, "none"),
    ("zb_h1", sized(pp=2, cp=2), {}, 4, True, "full"),
]


def run_case(number: int) -> tuple[Found, float]:
    family, mesh, options, chunk, tied, recompute = CASES[number]
    shape = shape_of(tied)
    schedule = hp.build_schedule(family, ranks=2, layers=2, microbatches=3, **options)
    pipeline = hp.Pipeline(
        hp.Decoder(shape, head_chunk=chunk, z_loss=Z), schedule, device_mesh(mesh), dtype=torch.float64, recompute=recompute,
        segment_lengths=(4, 4, 4) if options else None, timeout_s=30,
    )  # fmt: skip
    data = batch(shape, 3, LENGTH)
    loss, evaluated = pipeline.step(*data), pipeline.evaluate(*data)
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    pipeline.close()
    return Found(pipeline.mesh.here, loss, evaluated, 0.0, gradients, cuts), evaluated


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_gradients_have_it_and_losses_do_not(four_ranks: Ranks, number: int) -> None:
    loss, z_loss, expected = truth(CASES[number][4])
    results = four_ranks.run(run_case, number)
    for found, evaluated in results:
        assert abs(found.loss - loss) < 1e-12
        assert abs(evaluated - loss) < 1e-12
    gradients = assembled([found for found, _ in results])
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-9 * gradient.norm(), name
    assert z_loss > 0.01 * loss


def test_of_logits_far_from_zero() -> None:
    """float32: the log-sum-exp that it keeps is as good as torch's; a batch in which nothing counts has no gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 50, generator=generator) * 30 + 100
    targets = torch.tensor([3, -100, 49, 0, 7, -100, 1])
    for chosen in (targets, torch.full_like(targets, -100)):
        mine, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = cross_entropy(mine, chosen, Z)
        loss.backward()
        lse = plain.logsumexp(-1)[chosen != -100]
        whole = F.cross_entropy(plain, chosen, ignore_index=-100, reduction="sum")
        (whole + Z * lse.square().sum()).backward()
        assert torch.allclose(loss.detach().double(), whole.detach(), rtol=1e-6)
        assert mine.grad is not None
        assert plain.grad is not None
        assert torch.allclose(mine.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)


def test_without_it_nothing_is_other_than_torch() -> None:
    logits = torch.randn(5, 9, requires_grad=True)
    targets = torch.tensor([0, 1, 2, -100, 8])
    made = cross_entropy(logits, targets)
    assert made.grad_fn is not None
    assert "Nll" in made.grad_fn.name()
