"""Collections of cyclic garbage while steps run: how many, of which generation, how long, and what they found.

One rank, 1F1B of 8 micro-batches, as many steps as asked; the collector is as Python sets it, unless the pipeline says otherwise.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from typing import Any

import torch
from actions import LENGTH, SHAPE

from helixpipe.model.decoder import Decoder
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

MICROBATCHES = 8


def measure(steps: int) -> dict[str, Any]:
    """Of all steps together: collections inside of them by generation, milliseconds in them, the longest, objects found."""
    schedule = build_schedule("1f1b", ranks=1, layers=2, microbatches=MICROBATCHES)
    pipeline = Pipeline(Decoder(SHAPE), schedule)
    tokens = torch.zeros(MICROBATCHES, LENGTH, dtype=torch.int64)
    pipeline.step(tokens, tokens)
    inside, count, took, begun, found = False, Counter[int](), [0.0], 0.0, 0

    def heard(phase: str, info: dict[str, int]) -> None:
        nonlocal begun, found
        if phase == "start":
            begun = time.perf_counter()
        elif inside:
            count[info["generation"]] += 1
            took.append(time.perf_counter() - begun)
            found += info["collected"]

    gc.callbacks.append(heard)
    try:
        for _ in range(steps):
            inside = True
            pipeline.step(tokens, tokens)
            inside = False
            pipeline.zero_gradients()
    finally:
        gc.callbacks.remove(heard)
    pipeline.close()
    begun = time.perf_counter()
    gc.collect()
    return {
        "generations": dict(count), "ms": sum(took) * 1e3, "longest, ms": max(took) * 1e3, "found": found,
        "one full collection, ms": (time.perf_counter() - begun) * 1e3,
    }  # fmt: skip
