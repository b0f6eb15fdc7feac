"""On a CUDA device: what a step's line says of the device, and a step's trace. `pytest -m gpu`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from helixpipe.predict.hardware import accelerator_of_device
from helixpipe.train.device import peak_flops_per_s, peak_memory
from helixpipe.train.trace import Trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run on one with `make test-gpu`"),
]


def test_peaks_are_of_what_came_since_the_last_time() -> None:
    peak_memory("cuda:0")
    before, _ = peak_memory("cuda:0")
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0")
    del held
    allocated, reserved = peak_memory("cuda:0")
    assert allocated == before + (64 << 20)
    assert reserved >= allocated
    assert peak_memory("cuda:0")[0] == before


def test_the_rate_is_that_of_the_accelerator_if_its_name_is_known() -> None:
    found = accelerator_of_device(torch.cuda.get_device_name(0))
    assert peak_flops_per_s("cuda:0", 2) == (found.flops_per_s if found else None)


def test_a_trace_has_kernels_and_the_allocator_s_history(tmp_path: Path) -> None:
    trace = Trace(1, tmp_path, 0, "cuda:0")
    trace.begin(1)
    torch.ones(512, 512, device="cuda:0") @ torch.ones(512, 512, device="cuda:0")
    assert trace.end().endswith("with memory snapshots")
    events = json.loads((tmp_path / "profile" / "step-00000001-rank-0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    snapshot = pickle.loads((tmp_path / "profile" / "step-00000001-rank-0.memory.pickle").read_bytes())
    assert any(snapshot["device_traces"])
