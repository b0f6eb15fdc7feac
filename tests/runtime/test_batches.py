"""Batches that cannot be are refused in one line, before anything runs."""

from __future__ import annotations

import pytest
import torch

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=1, hidden=16, heads=2, ffn=32, vocabulary=17, positions="learned", context=8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 8), "tokens [0, 8], targets [0, 8]: give both as [sequences, tokens], none 0"),
        ((2, 0), "tokens [2, 0], targets [2, 0]: give both as [sequences, tokens], none 0"),
        ((3, 8), "tokens: 3 sequences do not divide into 2 micro-batches"),
        (
            (2, 9),
            "tokens: 9 a sequence, and learned positions have room for 8; shorten them or raise model.context",
        ),
    ],
)
def test_a_batch_that_cannot_be(size: tuple[int, int], message: str) -> None:
    pipeline = Pipeline(Decoder(SHAPE), build_schedule("gpipe", ranks=1, layers=1, microbatches=2))
    tokens = torch.zeros(size, dtype=torch.int64)
    for run in (pipeline.step, pipeline.evaluate):
        with pytest.raises(ConfigError) as caught:
            run(tokens, tokens)
        assert str(caught.value) == message
    pipeline.close()
