"""Device: what this rank's accelerator says of itself and of its memory."""

from __future__ import annotations

import torch

from helixpipe.errors import ConfigError
from helixpipe.predict.hardware import accelerator_of_device


def peak_flops_per_s(device: str, element_bytes: int) -> float | None:
    """The rate that the accelerator's maker states for matrix products of such elements; None where it is not known: on a CPU,
    and on devices that `predict.hardware` has no rates of.
    """
    if not device.startswith("cuda"):
        return None
    found = accelerator_of_device(torch.cuda.get_device_name(device))
    try:
        return found.rate(element_bytes) if found is not None else None
    except ConfigError:  # of this precision no rate is stated
        return None


def peak_memory(device: str) -> tuple[float, float]:
    """The most bytes since the last time this was asked that tensors had at one time, and that the allocator had from the
    device; 0 where there is no such allocator.
    """
    if not device.startswith("cuda"):
        return 0.0, 0.0
    found = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(found[0]), float(found[1])
