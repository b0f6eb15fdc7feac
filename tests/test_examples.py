"""What a reader would run: the example of a model of one's own, and the GPU benchmark where there is no GPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helixpipe.parts.shapes import named_shape

ROOT = Path(__file__).parents[1]


def test_own_model_learns() -> None:
    done = subprocess.run([sys.executable, ROOT / "examples/own_model.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 5
    assert losses[0] > 5.3
    assert losses[-1] < 3.6


@pytest.mark.parametrize("contender", ["helixpipe", "torch"])
def test_gpu_benchmark_runs_without_one(contender: str) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/gpu/run.py"))
    rows = [row for row in script["rows"](16) if row["contender"] == contender]
    shape = named_shape("tiny", hidden=32, ffn=64)
    for row in rows:
        found = script["_measure"](row, shape, 32, "cpu", 1)
        assert found["tokens_per_s"] > 0
    assert {row["recompute"] for row in rows} >= {"none", "full"}
