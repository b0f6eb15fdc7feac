"""`helixpipe compare`: a run's measured step beside the predicted one. A real run's is in test_plan_command.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helixpipe.cli import main
from helixpipe.config_text import build_config, write_toml
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.timeline import Timeline
from helixpipe.predict.timeline_text import from_json, to_json
from helixpipe.schedule.lower import lower

TABLE = {
    "model": {"name": "tiny"}, "schedule": {"family": "helix", "ranks": 2, "microbatches": 4},
    "train": {"sequence_length": 256},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose measured step took two seconds an action."""
    config = build_config(TABLE)
    schedule, setting = config.build_schedule(), config.setting()
    program = lower(schedule, setting.shape, setting.batch(1))
    measured = simulate_program(program, lambda action: 2.0, lambda message: 0.5, keeping=setting.keeping)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(write_toml(config))
    (folder / "timeline.json").write_text(to_json(measured))
    return folder


def test_what_was_written_is_read(run: Path) -> None:
    text = (run / "timeline.json").read_text()
    assert to_json(from_json(text)) == text
    assert isinstance(from_json(text), Timeline)


def test_a_replay_differs_by_its_messages_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: helix, 2 ranks; predicted from this step's own action times"
    rows = {line[:28].strip(): line[28:].split() for line in lines[3:]}
    assert float(rows["makespan"][-1]) < 1
    for rank in range(2):
        assert rows[f"rank {rank} busy"][-1] == "1.000"
        assert rows[f"rank {rank} peak activation bytes"][-1] == "1.000"


def test_from_an_accelerator_with_a_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", str(run), "--hardware", "h100", "--html", str(page)]) == 0
    assert "predicted from h100" in capsys.readouterr().out
    assert "measured" in page.read_text()


def test_the_accelerator_that_is_named_and_not_the_runs_profile(
    run: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = {}
    for of in ("", str(profile)):
        table = {**TABLE, "schedule": {**TABLE["schedule"], "profile": of}}
        (run / "config.toml").write_text(write_toml(build_config(table)))
        for hardware in ("h100", "h20"):
            assert main(["compare", str(run), "--hardware", hardware, "--json"]) == 0
            numbers = json.loads(capsys.readouterr().out)["numbers"]
            busy[of, hardware] = [row["predicted"] for row in numbers if row["name"] == "busy_s"]
    assert busy["", "h100"] != busy["", "h20"]
    for hardware in ("h100", "h20"):
        assert busy[str(profile), hardware] == busy["", hardware]


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda run: (run / "config.toml").unlink(), "", "no config.toml there; name a run folder, such as runs/default-1"),
        (lambda run: (run / "timeline.json").unlink(), "", "timeline.json: No such file or directory; a run writes it at step"),
        (lambda run: (run / "timeline.json").write_text("{}"), "", "timeline.json: not a timeline; a run writes one at step"),
        (lambda run: (run / "timeline.json").write_text('{"spans": [[["0X0", 0, 1, ""]]], "memory": [], "standing": []}'), "",
         "timeline.json: not a timeline"),
        (lambda run: (run / "timeline.json").write_text('{"spans": [], "memory": [], "standing": []}'), "",
         "config.toml and timeline.json are not of one run: their actions differ"),
        (lambda run: None, "--hardware h1000", "--hardware: 'h1000' is not known; did you mean 'h100'?"),
        (lambda run: None, "--hardware h100 --profile p.json", "profile, hardware: both are given; choose one"),
        (lambda run: None, "--profile laptop", "error: --profile: laptop: cannot be read: no such file or directory"),
        (lambda run: None, "--link infiniband",
         "--link: messages of a replay take no time; give --profile or --hardware with it"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    run: Path, change: object, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run)  # type: ignore[operator]
    assert main(["compare", str(run), *flags.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err


@pytest.mark.timeout(120)
def test_bytes_are_one_accelerators_share_on_a_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pipeline ranks of two context ranks each: predicted as what one process holds, which is what it measures."""
    folder = tmp_path / "run"
    line = "--schedule.family 1f1b --schedule.ranks 2 --schedule.microbatches 2 --mesh.cp 2 --train.steps 1"
    line += " --train.evaluate_every 0 --data.held_out 0 --run.timeline_step 1 --run.checkpoint_every 0"
    assert main(["train", *line.split(), "--run.folder", str(folder)]) == 0
    for flags in ("", "--hardware laptop-core"):
        capsys.readouterr()
        assert main(["compare", str(folder), *flags.split(), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["numbers"]
        ratios = [row["ratio"] for row in told if row["name"] == "peak_activation_bytes"]
        # messages of a replay take no time, so of what was in transit it has none: 0.25 of 6 MiB here
        assert ratios == pytest.approx([1, 1], rel=0.08)
