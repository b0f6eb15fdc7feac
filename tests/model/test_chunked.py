"""How often a chunked part runs forward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from helixpipe.model.decoder import Decoder
from helixpipe.model.head import Head
from helixpipe.model.mlp import MLP
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

LAYERS, LENGTH, CHUNK = 2, 8, 4
SLICES = LENGTH // CHUNK
SHAPE = ModelShape(layers=LAYERS, hidden=8, heads=2, ffn=16, vocabulary=11)


@pytest.mark.parametrize(
    ("family", "options", "recompute", "mlps"),
    [
        ("1f1b", {}, "none", 2),
        ("1f1b", {}, "full", 2),  # the recompute leaves it out: nobody reads what it ends in
        ("1f1b", {}, "selective", 2),
        ("helix", {"travel": "attention"}, "selective", 2),
        ("helix", {"travel": "none"}, "selective", 3),  # a norm behind it does
    ],
)
def test_forwards_of_a_slice(
    monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, str], recompute: str, mlps: int
) -> None:
    ran: Counter[type] = Counter()
    for kind in (MLP, Head):

        def counted(self: torch.nn.Module, *inputs: torch.Tensor, whole: object = kind.whole) -> torch.Tensor:
            ran[type(self)] += 1
            return whole(self, *inputs)  # type: ignore[operator]

        monkeypatch.setattr(kind, "whole", counted)
    schedule = build_schedule(family, ranks=1, layers=LAYERS, microbatches=1, **options)
    pipeline = Pipeline(Decoder(SHAPE, 0, CHUNK, CHUNK), schedule, recompute=recompute)
    tokens = torch.randint(11, (1, LENGTH))
    pipeline.step(tokens, tokens)
    last = SLICES * 2  # the last layer's is followed by nothing, or by the head in a chunk of its own
    assert ran[MLP] == SLICES * mlps * (LAYERS - 1) + last
    assert ran[Head] == SLICES * 2


@pytest.mark.parametrize(("chunk", "shards", "own"), [(0, 4, 0), (4096, 1, 4096), (4096, 8, 512), (5, 2, 2), (3, 4, 1)])
def test_a_chunk_is_tokens_of_all_ranks_that_share_a_sequence(chunk: int, shards: int, own: int) -> None:
    mlp = MLP(SHAPE, chunk)
    mlp.shards = shards
    assert mlp.local_chunk == own
    ran: list[int] = []
    mlp.norm.register_forward_hook(lambda module, inputs, output: ran.append(inputs[0].shape[1]))
    mlp(torch.zeros(1, LENGTH, SHAPE.hidden))
    assert ran == ([own] * (LENGTH // own) if 0 < own < LENGTH else [LENGTH])
