"""What a training step exchanges beside its messages, and where the host reads numbers: counted in the training program itself.

Counted are calls of torch's backend, and reads of tensors (`item`, `tolist`, `float`, ...) by where helixpipe asks for them. On
an accelerator a read of what it computed waits for all that was queued before; here nothing waits, so that reads are told by
place and the reader says which are of the device.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helixpipe.config_text import build_config
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.train.job import Job
from helixpipe.train.loop import train
from helixpipe.train.stop import Stop

FIRST, LAST = 3, 7
READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy")


class Calls(TorchDispatchMode):
    """Counts the backend's calls."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.found[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count(
    rank: int, schedule: dict[str, Any], model: dict[str, Any], mesh: dict[str, int]
) -> dict[str, dict[str, float]]:
    """On a rank: calls and reads a step, the mean of steps FIRST to LAST - 1 of a small run."""
    folder = Path(tempfile.mkdtemp()) if rank == 0 else Path()
    config = build_config(
        {
            "model": {"layers": 4, "hidden": 32, "heads": 2, "ffn": 64} | model,
            "schedule": {"microbatches": 4} | schedule,
            "mesh": mesh,
            "train": {
                "steps": LAST + 1,
                "sequence_length": 64,
                "evaluate_every": 0,
                "evaluate_sequences": 1,
                "warmup_steps": 1,
            },
            "run": {"folder": str(folder / "run"), "checkpoint_every": 0, "timeline_step": 0},
        }
    )
    calls, reads = Counter[str](), Counter[str]()
    at: dict[int, tuple[Counter[str], Counter[str]]] = {}
    step, done = Pipeline.step, 0

    def counted(self: Pipeline, *args: Any, **kwargs: Any) -> float:
        nonlocal done
        done += 1
        at[done] = calls.copy(), reads.copy()
        return step(self, *args, **kwargs)

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(Pipeline, "step", counted))
        for name in READS:
            patched.enter_context(mock.patch.object(Tensor, name, _noted(getattr(Tensor, name), reads)))
        patched.enter_context(Calls(calls))
        train(Job(config, None, 0), "cpu", dist.group.WORLD, Stop())
    return {
        name: {key: (after[key] - before[key]) / (LAST - FIRST) for key in after if after[key] > before[key]}
        for name, before, after in (("calls", at[FIRST][0], at[LAST][0]), ("reads", at[FIRST][1], at[LAST][1]))
    }


def _noted(method: Any, reads: Counter[str]) -> Any:
    """The same method, and a note of who asked."""

    def reading(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if "helixpipe/" in name and "benchmarks/" not in name:
                if isinstance(self, torch.nn.Parameter) or type(self) is Tensor:
                    reads[f"{name.rsplit('helixpipe/', 1)[1]} {frame.f_code.co_name}"] += 1
                break
            frame = frame.f_back  # type: ignore[assignment]
        return method(self, *args, **kwargs)

    return reading
