"""What a reader would run: the examples, and the GPU benchmark where there is no GPU."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("example", ["chat", "text", "code"])
def test_data_of_one_s_own_is_prepared_and_learned(tmp_path: Path, example: str) -> None:
    """The commands that stand at the head of the config, with fewer steps."""
    config = ROOT / f"examples/{example}.toml"
    lines = [
        line.removeprefix("#     ")
        for line in config.read_text(encoding="utf-8").splitlines()
        if line.startswith("#     ")
    ]
    assert [line.split()[:2] for line in lines][1:] == [["helixpipe", "prepare"], ["helixpipe", "train"]]
    more = [
        "--train.steps",
        "8",
        "--train.warmup-steps",
        "2",
        "--train.evaluate-every",
        "8",
        "--train.evaluate-sequences",
        "4",
        "--run.folder",
        "run",
    ]
    for line in lines:
        words = line.replace("examples/", f"{ROOT}/examples/").split()
        command = [sys.executable, *(["-m", "helixpipe"] if words[0] == "helixpipe" else []), *words[1:]]
        done = subprocess.run(
            [*command, *(more if "train" in words else [])], cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    held_out = [each["held_out_loss"] for each in told if "held_out_loss" in each]
    assert len(held_out) == 2
    assert held_out[-1] < held_out[0] - 0.3
    manifest = json.loads((tmp_path / example / "tokens/manifest.json").read_text())
    assert manifest["vocabulary"] <= 1024
    assert (manifest["counted"] < manifest["tokens"] / 2) == (example == "chat")


def test_masked_diffusion_trains_on_two_ranks(tmp_path: Path) -> None:
    """The example as it stands, with fewer and shorter sequences."""
    shorter = ["--train.steps=2", "--train.sequence_length=32", "--train.evaluate_sequences=8", "--run.timeline_step=0"]
    done = subprocess.run(
        [sys.executable, "-m", "helixpipe", "train", ROOT / "examples/masked_diffusion.toml", *shorter],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == (
        "tiny: 853,120 parameters, 4 layers; helix on 2 ranks (cpu), 4 micro-batches of 2 x 32 tokens, objective "
        "masked_diffusion"
    )
    lines = (tmp_path / "runs/masked_diffusion-1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [found["held_out_loss"] for line in lines if "held_out_loss" in (found := json.loads(line))]
    assert len(held_out) == 2
    assert 3 < held_out[0] < 9, "of 256 tokens nothing is known: log 256, and as many as were masked"


@pytest.mark.parametrize("contender", ["helixpipe", "torch"])
def test_gpu_benchmark_runs_without_one(contender: str) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/gpu/run.py"))
    rows = [row for row in script["rows"](16) if row["contender"] == contender]
    shape = named_shape("tiny", hidden=32, ffn=64)
    for row in rows:
        found = script["_measure"](row, shape, 32, "cpu", 1)
        assert found["tokens_per_s"] > 0
    assert {row["recompute"] for row in rows} >= {"none", "full"}
