"""Batches go to a CUDA device from pinned memory, without the CPU waiting; here the device is only a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helixpipe.runtime.mesh import Mesh
from helixpipe.runtime.shares import Shares


def test_a_batch_is_copied_from_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(None, 30.0, torch.device("cpu"))
    shares = Shares(mesh, None, 2, lambda length, documents: (length,), torch.device("cuda", 0))
    pinned, copied = list[int](), list[tuple[Any, ...]]()

    def pin_memory(self: Tensor) -> Tensor:
        pinned.append(self.data_ptr())
        return self

    def to(self: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        copied.append((self.data_ptr(), device, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    tokens, targets = torch.arange(24).view(4, 6), torch.arange(24, 48).view(4, 6)
    feeds = shares.feeds(tokens, targets, [shares.batch(tokens, targets)] * 2)
    assert pinned == [tokens.data_ptr(), targets.data_ptr()]
    assert copied == [(pointer, torch.device("cuda", 0), True) for pointer in pinned]
    assert torch.equal(feeds[1, 0].tokens, tokens[2:])
    assert torch.equal(feeds[0, 0].targets, targets[:2])
