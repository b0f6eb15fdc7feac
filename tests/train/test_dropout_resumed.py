"""A run whose parts draw random numbers goes on with those of the steps that come, not of the first ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_freezing import job, state
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.train import start
from helixpipe.train.initial import initial_model
from helixpipe.train.loop import train
from helixpipe.train.stop import Stop


class Dropped(nn.Module):
    """A norm with dropout behind it, under the norm's own names."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters():
            setattr(self, name, parameter)
        self.inner = [norm]  # not registered

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner[0](x), 0.3, self.training)  # type: ignore[no-any-return]


@contextmanager
def dropped(*args: object) -> Iterator[hp.Decoder]:
    """The config's model with dropout in every layer."""
    with initial_model(*args) as model:  # type: ignore[arg-type]
        part = model.part
        model.part = lambda each: Dropped(part(each)) if each.kind == "norm" else part(each)  # type: ignore[method-assign]
        yield model


def test_dropout_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against counting steps from 0 again, which had the masks of steps 1 and 2 at steps 3 and 4."""
    monkeypatch.setattr(start, "initial_model", dropped)
    words = ("--train.evaluate_every", "0")
    train(job(tmp_path, *words, freeze=[]), "cpu", None, Stop())
    second = tmp_path / "run/checkpoints/step-00000002"
    again = ("--resume", str(second), "--run.folder", str(tmp_path / "again"))
    train(job(tmp_path, *words, *again, freeze=[]), "cpu", None, Stop())
    one, two = (state(tmp_path / place / "checkpoints/step-00000004") for place in ("run", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
