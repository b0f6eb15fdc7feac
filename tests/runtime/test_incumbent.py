"""benchmarks/rehearsal compares with torch's runtime: its sleeping stages must sleep what they should, where they should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks/rehearsal/incumbent.py"
# F, I and W: each longer than the next by more than a sleep is late
SECONDS = (0.01, 0.05, 0.03)


@pytest.fixture(scope="module")
def incumbent() -> Any:
    pytest.importorskip("torch.distributed.pipelining")
    spec = importlib.util.spec_from_file_location("incumbent", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def slept(stage: Any) -> list[int]:
    """What it slept since last asked: 0 for F, 1 for I, 2 for W; each for its own time."""
    kinds = [kind for kind, _, _ in stage.slept]
    assert all(end - begin >= SECONDS[kind] for kind, begin, end in stage.slept)
    stage.slept.clear()
    return kinds


def test_torch_s_split_backward_sleeps_i_then_w(incumbent: Any) -> None:
    backward = pytest.importorskip("torch.distributed.pipelining._backward")
    stage = incumbent.Sleeping(SECONDS, is_first=False)
    x = torch.zeros(1, 1, requires_grad=True)
    outputs = (stage(x),)
    assert slept(stage) == [0]
    gradients, groups = backward.stage_backward_input(outputs, (torch.ones(1, 1),), [x], stage.parameters())
    assert slept(stage) == [1]
    assert gradients[0] is not None
    backward.stage_backward_weight(stage.parameters(), groups)
    assert slept(stage) == [2]


def test_a_full_backward_sleeps_both(incumbent: Any) -> None:
    stage = incumbent.Sleeping(SECONDS, is_first=True)
    stage(torch.zeros(1, 1)).sum().backward()
    assert sorted(slept(stage)) == [0, 1, 2]  # a first stage has an input without gradient, and does all the same work


def test_a_step_of_scale_0_sleeps_nothing(incumbent: Any) -> None:
    stage = incumbent.Sleeping((60.0, 60.0, 60.0), is_first=True)
    stage.scale = 0.0
    stage(torch.zeros(1, 1)).sum().backward()
    assert sorted(kind for kind, _, _ in stage.slept) == [0, 1, 2]
