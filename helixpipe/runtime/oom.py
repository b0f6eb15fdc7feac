"""Out of memory: how torch and Python say that there is no more of it."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says: torch's allocator for CPUs has no error of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)
