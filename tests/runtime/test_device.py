"""What a pipeline asks of its device before anything runs."""

from __future__ import annotations

import pytest
import torch

from helixpipe.model.decoder import Decoder
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.shape import ModelShape

SHAPE = ModelShape(layers=1, hidden=16, heads=2, ffn=32, vocabulary=17)
SCHEDULE = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)


class Chosen(Exception):
    """Enough was seen."""


def test_a_pipelines_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: torch.device) -> None:
        raise Chosen(device)

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(Chosen, match="^cuda:1$"):
        Pipeline(Decoder(SHAPE), SCHEDULE, device="cuda:1")
    Pipeline(Decoder(SHAPE), SCHEDULE, device="cpu").close()
