"""Traces: one step of a rank for a browser; what cannot be written costs a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helixpipe.config_text import build_config
from helixpipe.errors import ConfigError
from helixpipe.train.trace import Trace


def traced(trace: Trace, *steps: int) -> list[str]:
    found = []
    for step in steps:
        trace.begin(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        found.append(trace.end())
    return found


def test_one_step_of_each_rank_is_a_file(tmp_path: Path) -> None:
    assert traced(Trace(2, tmp_path, 0, "cpu"), 1, 2, 3) == [
        "",
        f"step 2 is traced in {tmp_path / 'profile'}, a file a rank, without memory snapshots, which are of CUDA alone",
        "",
    ]
    assert traced(Trace(2, tmp_path, 1, "cpu"), 2) == [""]  # rank 0 says it
    assert traced(Trace(0, tmp_path, 0, "cpu"), 1, 2) == ["", ""]
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["step-00000002-rank-0.json", "step-00000002-rank-1.json"]
    for name in names:
        events = json.loads((tmp_path / "profile" / name).read_text())["traceEvents"]
        assert sum(event.get("name") == "aten::mm" for event in events) == 1


def test_a_folder_that_cannot_be_costs_a_line(tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    assert traced(Trace(2, tmp_path, 3, "cpu"), 2) == [
        f"run.profile_step: rank 3's trace cannot be written to {tmp_path / 'profile'}: file exists; the run goes on"
    ]


def test_on_cuda_the_allocator_s_history_is_written_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch documents it, with its functions stood in for."""
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **more: calls.append((enabled, more)))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda filename: calls.append(filename))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.warns(UserWarning, match="CUDA"):
        (said,) = traced(Trace(2, tmp_path, 0, "cuda:0"), 2)
    assert said == f"step 2 is traced in {tmp_path / 'profile'}, a file a rank, with memory snapshots"
    assert calls == [
        ("all", {"max_entries": 100_000}),
        str(tmp_path / "profile" / "step-00000002-rank-0.memory.pickle"),
        (None, {}),
    ]


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        (-1, "run.profile_step: -1; give at least 0"),
        (121, "run.profile_step: 121 comes after the last step, train.steps 120; lower it"),
    ],
)
def test_a_step_that_cannot_be_traced_is_one_line(step: int, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"run": {"profile_step": step}})
    assert str(caught.value) == fault
