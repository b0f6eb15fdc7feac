"""What a reader would run: the examples of a model of one's own, and the GPU benchmark where there is no GPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helixpipe.parts.shapes import named_shape

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("example", "learned"), [("own_model", 2.5), ("own_parts", 3.6)])
def test_own_model_learns(example: str, learned: float) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / f"examples/{example}.py"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 5
    assert losses[0] > 5.3
    assert losses[-1] < learned


def test_the_easy_example_is_short() -> None:
    """Its promise: a model of one's own, trained, in no more than 30 lines."""
    lines = (ROOT / "examples/own_model.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


@pytest.mark.parametrize("contender", ["helixpipe", "torch"])
def test_gpu_benchmark_runs_without_one(contender: str) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/gpu/run.py"))
    rows = [row for row in script["rows"](16) if row["contender"] == contender]
    shape = named_shape("tiny", hidden=32, ffn=64)
    for row in rows:
        found = script["_measure"](row, shape, 32, "cpu", 1)
        assert found["tokens_per_s"] > 0
    assert {row["recompute"] for row in rows} >= {"none", "full"}
