"""Sequences of several documents, and plain autograd run on each document by itself: what packed runs must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from oracle import plain_logits
from torch import Tensor
from values import initial_values

import helixpipe as hp

Lengths = tuple[tuple[int, ...], ...]

LENGTH = 24
SEGMENTS = {1: (24,), 2: (14, 10), 3: (12, 4, 8), 5: (8, 4, 4, 4, 4)}
PACKINGS: dict[str, Lengths] = {
    # inside of segments, over several of them, of one token, and one document alone
    "inside": ((5, 7, 9, 3), (10, 14), (24,), (1, 2, 13, 1, 1, 6), (20, 4), (3, 21), (7, 10, 7), (23, 1)),
    # exactly segments, or several; a whole micro-batch packed alike
    "at": ((12, 4, 8), (12, 4, 8), (8, 4, 4, 4, 4), (16, 8), (14, 10), (14, 10), (4, 8, 4, 8), (12, 12)),
    "ones": ((1,) * 24, (11, *(1,) * 13), (1, 22, 1), (24,), (1, 23), (2,) * 12, (1,) * 24, (24,)),
}


def packed_step(
    shape: hp.ModelShape, tokens: Tensor, targets: Tensor, documents: Lengths
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of a Decoder's first step over all targets that count, and every gradient, each document by itself."""
    w = {name: value.double().requires_grad_() for name, value in initial_values(shape).items()}
    counted = int((targets != -100).sum())
    total, gradients = 0.0, {name: torch.zeros_like(value) for name, value in w.items()}
    for row, lengths in enumerate(documents):
        begin = 0
        for length in lengths:
            here = slice(begin, begin + length)
            begin += length
            if bool((targets[row, here] == -100).all()):
                continue
            logits = plain_logits(shape, w, tokens[row : row + 1, here])
            loss = F.cross_entropy(logits[0], targets[row, here], ignore_index=-100, reduction="sum") / counted
            total += float(loss.detach())
            for name, found in zip(w, torch.autograd.grad(loss, list(w.values()), allow_unused=True), strict=True):
                if found is not None:
                    gradients[name] += found
    return total, gradients


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-9) -> None:
    """Each gradient to 1e-9 relative; one that is nothing but rounding, as of q where each sees one key, to rounding."""
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm())
        assert error < limit * float(gradient.norm()) or error < 1e-15 * largest, f"{name}: {error:.1e}"
