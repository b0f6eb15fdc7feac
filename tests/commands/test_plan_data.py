"""`plan --data`: schedules ranked by steps of real documents."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from real_data import LENGTH, SIZES, asked, documents_of, setting

from helixpipe.config_text import build_config, read_toml
from helixpipe.parts.work import Batch
from helixpipe.predict.candidates import candidates
from helixpipe.predict.plan import plan
from helixpipe.predict.steps import step_batches, typical
from helixpipe.train.data import open_corpus


def test_a_plan_is_ranked_by_real_steps(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "best.toml"
    line = f"plan {SIZES} --families 1f1b,gpipe --processes 1 --packing documents --seed 2"
    listed = asked(capsys, f"{line} --data {folders['tailed']} --steps 3 --config {config}")
    best = next(each for each in listed if each["is_pipeline"])
    assert best["data"] == {
        "path": str(folders["tailed"]), "packing": "documents", "longest": "cut", "seed": 2, "steps": 3,
    }  # fmt: skip
    table = read_toml(config)
    assert table["run"].pop("asks") == ["train.steps", "train.learning_rate"]  # where the data is, the plan was told
    written = build_config(table)
    reading = open_corpus(written).reading
    found = [
        asked(capsys, f"simulate {best['family']} {SIZES} --recompute {best['recompute']} --data {folders['tailed']} "
                      f"--packing documents --seed 2 --steps 3")["data"]
    ]  # fmt: skip
    assert best["makespan_s"] == found[0]["step_s"]["mean"]
    assert best["bubble_ratio"] == pytest.approx(found[0]["bubble_ratio"]["mean"])
    assert max(rank["peak_bytes"] for rank in best["ranks"]) == found[0]["peak_bytes"]
    times = [each["makespan_s"] for each in listed]
    assert times == sorted(times)
    whole = written.setting().whole
    for step in range(1, 4):
        assert step_batches(written.setting(), written.build_schedule(), reading.documents(step)) != ((whole,) * 4,)


def test_a_plan_prices_the_best_of_those_that_fit_alone_on_steps(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says how many more fit; what is no pipeline is priced on the same steps."""
    monkeypatch.setattr("helixpipe.predict.plan.MOST_ON_STEPS", 1)
    steps = tuple(documents_of(folders["tailed"], 2))
    found = plan(setting(), 2, 4, 2.0**40, ("1f1b", "gpipe"), steps=steps)
    pipelines = [choice for choice in found.fits if choice.is_pipeline]
    assert found.unpriced > 0
    # one more is the fastest with the vocabulary on all ranks
    assert len(pipelines) + found.unpriced == len(candidates(2, 4, LENGTH, 128, only=("1f1b", "gpipe"))) + 1
    whole = plan(setting(), 2, 4, 2.0**40, ("1f1b", "gpipe"))
    by_name = {(choice.candidate): choice for choice in whole.fits}
    for choice in found.fits:
        assert choice.makespan_s < by_name[choice.candidate].makespan_s
        assert choice.ideal_s == pytest.approx(found.best.ideal_s)
    (fsdp,) = [each for each in found.fits if each.candidate.family == "fsdp" and each.candidate.recompute == "none"]
    seconds = setting().batch_s
    turns = []
    for step in steps:
        each = [seconds(Batch(1, (LENGTH,), (row,))) for row in step]
        turns.append(max(each[:2]) + max(each[2:]))
    assert fsdp.makespan_s >= statistics.mean(turns) * (1 - 1e-9)


def test_the_typical_micro_batch_has_nearly_the_mean_work(folders: dict[str, Path]) -> None:
    steps = documents_of(folders["tailed"], 4)
    work = [setting().batch_s(setting().batch(1, [row])) for step in steps for row in step]
    (row,) = typical(setting(), steps)
    assert any(row in step for step in steps)
    mean = statistics.mean(work)
    assert abs(setting().batch_s(setting().batch(1, [row])) - mean) == min(abs(each - mean) for each in work)
    assert typical(setting(), [(), ()]) == ()
