"""What a pipeline asks of its device before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.model.kernels import check_head_dim
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=1, hidden=16, heads=2, ffn=32, vocabulary=17)
SCHEDULE = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)


class Chosen(Exception):
    """Enough was seen."""


@pytest.mark.parametrize("head_dim", [12, 264])
def test_heads_that_no_kernel_takes_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    shape = replace(SHAPE, head_dim=head_dim)
    with pytest.raises(ConfigError) as caught:
        Pipeline(Decoder(shape), SCHEDULE, device="cuda:0", dtype=torch.bfloat16)
    assert str(caught.value) == (
        f"model.head_dim: {head_dim}; attention on CUDA in bfloat16 needs a multiple of 8 up to 256: change it, or set "
        "runtime.dtype to float32"
    )


def test_other_heads_devices_and_precisions_are_taken() -> None:
    check_head_dim(256, torch.device("cuda"), torch.bfloat16)
    check_head_dim(12, torch.device("cuda"), torch.float32)
    check_head_dim(12, torch.device("cpu"), torch.bfloat16)


def test_a_pipelines_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: torch.device) -> None:
        raise Chosen(device)

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(Chosen, match=r"^cuda:1$"):
        Pipeline(Decoder(SHAPE), SCHEDULE, device="cuda:1")
    Pipeline(Decoder(SHAPE), SCHEDULE, device="cpu").close()
