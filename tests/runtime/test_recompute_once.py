"""How often a forward runs in a step: a split backward, or a recompute ahead of it, adds none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from oracle import batch
from test_split_and_segments import BACKWARDS, LENGTHS, SHAPE, Case, schedule_of

from helixpipe.model import merging
from helixpipe.model.attn import Attention
from helixpipe.model.decoder import Decoder
from helixpipe.model.mlp import MLP
from helixpipe.runtime.pipeline import Pipeline

MICROBATCHES = 2


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts "mlp", each run of an MLP, and "attention", each run of an attention that attends and is no replay."""
    counts: Counter[str] = Counter()
    kernel, attend, whole = merging.attention_forward, Attention.forward, MLP.whole

    def counted_kernel(*given: object) -> object:
        counts["kernel"] += 1
        return kernel(*given)

    def counted_attend(self: Attention, *given: object) -> torch.Tensor:
        before = counts["kernel"]
        out = attend(self, *given)
        counts["attention"] += counts["kernel"] > before  # one run, however many kernels its segments take
        return out

    def counted_whole(self: MLP, *given: torch.Tensor) -> torch.Tensor:
        counts["mlp"] += 1
        return whole(self, *given)

    monkeypatch.setattr(merging, "attention_forward", counted_kernel)
    monkeypatch.setattr(Attention, "forward", counted_attend)
    monkeypatch.setattr(MLP, "whole", counted_whole)
    return counts


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("recompute", "mlps", "attentions"), [("none", 1, 1), ("full", 2, 2), ("selective", 2, 1)], ids=lambda value: value
)
def test_forwards_of_a_step(
    ran: Counter[str], recompute: str, mlps: int, attentions: int, segments: int, backward: str
) -> None:
    schedule = schedule_of(Case(1, segments, backward, recompute), MICROBATCHES)
    pipeline = Pipeline(Decoder(SHAPE), schedule, recompute=recompute, segment_lengths=LENGTHS[segments])
    pipeline.step(*batch(SHAPE, MICROBATCHES, 12))
    pipeline.close()
    units = SHAPE.layers * MICROBATCHES * segments
    assert (ran["mlp"], ran["attention"]) == (mlps * units, attentions * units)
