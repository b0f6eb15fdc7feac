"""Place: where a process stands among the ranks, and the device and backend that are its own."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from helixpipe.errors import ConfigError


class Place(NamedTuple):
    """Where a rank stands; `local` is among those of its machine."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int

    @staticmethod
    def is_told() -> bool:
        """Whether somebody started this process as a rank."""
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ

    @staticmethod
    def from_environment() -> Place:
        """As torchrun, and our launchers, tell it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            return Place(*(int(os.environ[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"environment: {error} is missing or no number; start ranks with torchrun, which sets {', '.join(names)}"
            ) from None

    def to_environment(self) -> None:
        """For whoever asks there."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        os.environ.update(zip(names, map(str, self), strict=True))

    def device(self, wanted: str, key: str) -> str:
        """Of `cpu`, `cuda` or `auto` the one for this rank, which becomes the current one; `key` is where it was asked for."""
        if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if not torch.cuda.is_available():
            raise ConfigError(f"{key}: 'cuda', and torch sees none here; use 'auto' or 'cpu'")
        index = self.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return f"cuda:{index}"

    def backend(self, device: str) -> str:
        """Several ranks on one device cannot use NCCL: they go through host memory."""
        return "nccl" if device != "cpu" and self.local_ranks <= torch.cuda.device_count() else "gloo"
