"""Steps that are not finite: the run ends and says where from, or goes on exactly as if the update had never been asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_freezing import job, state
from torch import Tensor, nn

from helixpipe.cli import main
from helixpipe.config import TrainConfig
from helixpipe.config_text import build_config
from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part
from helixpipe.runtime import tape
from helixpipe.runtime.losses import Losses
from helixpipe.train import manifest
from helixpipe.train.held_out import check_finite
from helixpipe.train.loop import train
from helixpipe.train.optimizer import Optimizer
from helixpipe.train.skipping import Skipping
from helixpipe.train.stop import Stop

CAUSE = "layer 1's mlp, on rank 0, micro-batch 1, forward"


@contextmanager
def spoiled(*steps: int) -> Iterator[None]:
    """Within it steps of these numbers, counted from where the process begins, are not finite."""
    original = tape.run_part

    def run_part(part: Part, module: Any, inputs: Sequence[Tensor], feed: tape.Feed, *more: Any) -> Sequence[Tensor]:
        made = original(part, module, inputs, feed, *more)
        assert feed.stream is not None
        here = (str(part), feed.microbatch) == ("mlp.1", 1) and feed.stream.step + 1 in steps and not feed.by_token
        return [each * math.nan for each in made] if here else made

    tape.run_part = run_part
    try:
        yield
    finally:
        tape.run_part = original


def run(folder: Path, *more: str) -> list[dict[str, Any]]:
    """The metrics of a run of six steps."""
    words = ("--train.steps", "6", "--train.decay_steps", "6", "--train.evaluate_every", "0", "--run.keep", "9")
    with spoiled(3):
        train(job(folder, *words, "--train.on_nonfinite", "skip", *more, freeze=[]), "cpu", None, Stop())
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_skipped_step_leaves_weights_moments_and_their_count_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 5, 6]
    assert [line for line in lines if "skipped" in line] == [{"step": 3, "skipped": CAUSE}]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("helixpipe:")]
    assert [line for line in said if "still being written" not in line] == [  # as a slow disk may have it
        f"helixpipe: step 3: loss nan, gradient norm nan: the first value that is not finite came from {CAUSE}; its update is not made"
    ]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [manifest.verify(path).skipped for path in manifest.checkpoints(checkpoints)] == [0, 1, 1]
    whole = state(checkpoints / "step-00000006")

    # from a checkpoint behind the step, and without any in between
    for name, words in {
        "behind": ("--resume", str(checkpoints / "step-00000004")),
        "straight": ("--run.checkpoint_every", "6"),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        first = {"behind": 4, "straight": 0}[name]
        with spoiled(3 - first):  # a process counts from 0
            again = job(
                folder, "--train.steps", "6", "--train.decay_steps", "6", "--train.evaluate_every", "0", "--train.on_nonfinite",
                "skip", "--data.path", str(tmp_path / "text.txt"), *words, freeze=[],
            )  # fmt: skip
            train(again, "cpu", None, Stop())
        found = state(folder / "run" / "checkpoints" / "step-00000006")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole), name


def test_a_run_that_is_not_to_skip_ends_and_says_where_from(tmp_path: Path) -> None:
    with spoiled(2), pytest.raises(ConfigError) as caught:
        train(job(tmp_path, "--run.checkpoint_every", "1", freeze=[]), "cpu", None, Stop())
    assert str(caught.value) == (
        f"step 2: loss nan, gradient norm nan: the first value that is not finite came from {CAUSE}; lower train.learning_rate or "
        "train.clip_norm, or set train.on_nonfinite to skip"
    )
    checkpoints = manifest.checkpoints(tmp_path / "run" / "checkpoints")  # the one being written came to its end
    assert [manifest.verify(path).step for path in checkpoints] == [1]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_more_in_a_row_than_the_limit_end_the_run() -> None:
    settings = TrainConfig(on_nonfinite="skip", nonfinite_limit=2)
    skipping = Skipping(settings, 5)
    for step in (1, 2):
        skipping.skip(step, math.inf, 3.0, "")
    skipping.passed()
    for step in (4, 5):
        assert skipping.skip(step, 2.5, math.inf, "") == (
            f"step {step}: loss 2.5, gradient norm inf: where that came from is not known, since all was finite when the step ran "
            "once more; its update is not made"
        )
    with pytest.raises(ConfigError) as caught:
        skipping.skip(6, math.nan, math.nan, CAUSE)
    assert str(caught.value) == (
        f"step 6: loss nan, gradient norm nan: the first value that is not finite came from {CAUSE}; 3 such steps in a row are more "
        "than train.nonfinite_limit 2: lower train.learning_rate or train.clip_norm"
    )
    assert skipping.skipped == 10


def test_the_count_of_updates_is_the_optimizers_own() -> None:
    """Of AdamW's bias correction: a step that was not made is no update."""
    config = TrainConfig(warmup_steps=0, learning_rate=0.1)
    weights = {"w": nn.Parameter(torch.ones(2, 2))}
    optimizer = Optimizer(weights, config)
    weights["w"].grad = torch.ones(2, 2)
    optimizer.step(0)
    optimizer.step(2)  # step 1 was skipped
    assert optimizer._adamw is not None
    count = optimizer._adamw.state[weights["w"]]["step"]
    optimizer.state(2)
    assert optimizer._adamw.state[weights["w"]]["step"] == count == 2


def test_a_held_out_loss_that_is_not_finite_is_an_error_of_training_and_of_evaluating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(job(tmp_path, freeze=[]), "cpu", None, Stop())
    original = tape.run_part

    def run_part(part: Part, *more: Any) -> Sequence[Tensor]:
        made = original(part, *more)
        return [each * math.nan for each in made] if part.kind == "head" and more[2].by_token else made

    monkeypatch.setattr(tape, "run_part", run_part)
    with pytest.raises(ConfigError) as caught:
        train(job(tmp_path, "--run.folder", str(tmp_path / "other"), freeze=[]), "cpu", None, Stop())
    assert str(caught.value) == (
        "step 0: the held-out loss is nan; lower train.learning_rate, or go on from an earlier checkpoint"
    )
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == ""
    capsys.readouterr()
    for more in ([], ["--json"]):
        assert main(["evaluate", "--resume", str(tmp_path / "run"), *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1] == (
            f"helixpipe: error: {tmp_path}/run/checkpoints/step-00000004: the held-out loss is nan; its weights, or what they make, "
            "are beyond runtime.dtype; choose another checkpoint"
        )


def test_held_out_data_of_which_nothing_counts_has_no_loss() -> None:
    check_finite(Losses(5.0, 2), "step 1", "do something")
    with pytest.raises(
        ConfigError, match=r"^step 1: no target of the held-out data counts; give data.held_out a larger share$"
    ):
        check_finite(Losses(0.0, 0), "step 1", "do something")


@pytest.mark.parametrize(("dtype", "rate"), [("float32", 3e38), ("bfloat16", 3.5e37), ("float64", 2e307)])
def test_a_learning_rate_beyond_adamw_is_refused_before_anything_is_written(dtype: str, rate: float) -> None:
    table: dict[str, Any] = {"train": {"learning_rate": rate}, "runtime": {"dtype": dtype}}
    with pytest.raises(ConfigError) as caught:
        build_config(table)
    name, most = ("float64", "1.8e+308") if dtype == "float64" else ("float32", "3.4e+38")
    assert str(caught.value) == (
        f"train.learning_rate: {rate:g}, of which AdamW's first step takes 10 times as much, and {name} ends at {most}; lower it"
    )
    table["train"]["learning_rate"] = rate / 20
    assert build_config(table).train == dataclasses.replace(TrainConfig(), learning_rate=rate / 20)
