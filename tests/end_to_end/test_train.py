"""`helixpipe train` as a user runs it: processes, files and what stands on the screen."""

from __future__ import annotations

import glob
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import small_disk
from runs import STEPS, TORCHRUN, Run, alive, losses, metrics

from helixpipe.train import manifest

pytestmark = pytest.mark.timeout(290)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped: its folder."""
    run = Run(tmp_path_factory.mktemp("reference"), "small.toml", "--run.profile_step", "3")
    assert run.wait() == 0, run.err
    assert run.out.startswith(f"trained to step {STEPS} in 0:")
    said_of_us = [line for line in run.err.splitlines() if "helixpipe:" in line]
    (said,) = [line for line in said_of_us if "times their own median" not in line]  # of a busy machine
    assert said.startswith("helixpipe: step 3 is traced in ")
    assert f"step 1/{STEPS}  loss 5." in run.err
    assert f"step {STEPS}/{STEPS}  held-out loss " in run.err
    return run.folder / "runs" / "small-1"


def test_a_run_leaves_config_metrics_checkpoints_and_a_timeline(reference: Path) -> None:
    assert sorted(path.name for path in reference.iterdir()) == [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "profile",
        "timeline.html",
        "timeline.json",
        "timeline.perfetto.json",
        "timeline.svg",
    ]
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    traces = sorted((reference / "profile").iterdir())
    assert [path.name for path in traces] == ["step-00000003-rank-0.json", "step-00000003-rank-1.json"]
    assert all(json.loads(path.read_text())["traceEvents"] for path in traces)
    assert (reference / "timeline.svg").read_text().startswith("<svg")
    lines = metrics(reference)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 6, 12]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    for line in steps:
        assert line["grad_norm"] > 0
        assert line["tokens_per_s"] == pytest.approx(2 * line["tokens_per_s_per_accelerator"], abs=0.2)
        assert line["model_flops_per_s"] > 0
        assert 0 <= line["data_s"] < line["step_s"]
        assert (line["mfu"], line["peak_allocated_bytes"]) == (None, None)  # a CPU has neither
        # an evaluation and a checkpoint are in the line that comes next
        assert (line["evaluation_s"] > 0) == (line["step"] in (1, 7))
        assert (line["checkpoint_s"] > 0) == (line["step"] in (4, 7, 10))
        assert 0 <= line["bubble_ratio"] < 1
        assert len(line["peak_activation_bytes"]) == 2
        assert min(line["peak_activation_bytes"]) > 0


def test_killed_in_every_way_and_resumed_the_losses_are_as_never_stopped(
    reference: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    checkpoints = tmp_path / "runs" / "small-1" / "checkpoints"

    # one rank: the others end within seconds, and its name is on the screen
    run = start("small.toml")
    run.until((checkpoints / "step-00000003").exists)
    ranks = run.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert run.wait(timeout_s=10) == 1
    assert not any(map(alive, ranks))
    last = sorted(path.name for path in checkpoints.glob("step-*"))[-1]
    assert [line for line in run.err.splitlines() if line.startswith("helixpipe:")] == [
        f"helixpipe: error: rank 1 (pid {ranks[1]}) was killed by SIGKILL; the other ranks are stopped; "
        f"--resume continues from {last}"
    ]
    assert "Traceback" not in run.err

    # the launcher alone: its ranks do not outlive it
    run = start("small.toml", "--resume")
    run.until((checkpoints / "step-00000006").exists)
    ranks = run.ranks()
    run.process.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.05)

    # everything, while a checkpoint is written; with the config that was saved, from a path
    run = start("--resume", "runs/small-1", "--run.checkpoint_every", "1")
    run.until((checkpoints / "step-00000008").exists)
    ranks = run.ranks()
    being_written = str(checkpoints / ".step-*[0-9].tmp/*")
    run.until(lambda: glob.glob(being_written), every_s=0)  # Path.glob fails on a folder that goes meanwhile
    for pid in (*ranks, run.process.pid):
        os.kill(pid, signal.SIGKILL)
    run.wait()

    assert losses(tmp_path / "runs" / "small-1") != losses(reference)
    run = start("small.toml", "--resume")
    assert run.wait() == 0, run.err
    assert losses(tmp_path / "runs" / "small-1") == losses(reference)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize(("family", "ranks"), [("1f1b", 3), ("gpipe", 1)])
def test_resumed_with_another_family_and_rank_count_the_losses_are_the_same_to_float32(
    reference: Path, tmp_path: Path, start: Callable[..., Run], family: str, ranks: int
) -> None:
    path = reference / "checkpoints" / "step-00000009"
    run = start(
        "small.toml", "--resume", str(path), "--run.folder", "other",
        "--schedule.family", family, "--schedule.ranks", str(ranks), "--runtime.recompute", "none",
    )  # fmt: skip
    assert run.wait() == 0, run.err
    assert "helixpipe: continuing with changes: schedule.family helix -> " in run.err
    found = losses(tmp_path / "other")
    wanted = [(step, loss) for step, loss in losses(reference) if step > 9]
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=2e-5)


def test_a_mesh_trains_as_one_pipeline_does_and_its_checkpoint_moves_to_another(
    reference: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    run = start(
        "small.toml", "--mesh.dp", "2", "--mesh.optimizer", "sharded", "--schedule.microbatches", "2", "--run.keep", "9"
    )
    folder = tmp_path / "runs" / "small-1"
    run.until((folder / "metrics.jsonl").exists)
    assert len(run.ranks()) == 4
    assert run.wait() == 0, run.err
    assert "helix on 4 ranks (pp 2 x dp 2) (cpu)" in run.err
    # the second half again, of other parts of the model on other ranks
    run = start(
        "small.toml", "--resume", str(folder / "checkpoints" / "step-00000006"), "--run.folder", "other",
        "--schedule.ranks", "1", "--schedule.folds", "1", "--mesh.cp", "2", "--mesh.tp", "2",
    )  # fmt: skip
    assert run.wait() == 0, run.err
    assert "helix on 4 ranks (pp 1 x cp 2 x tp 2) (cpu)" in run.err
    later = [pair for pair in losses(reference) if pair[0] > 6]
    for found, wanted in ((losses(folder), losses(reference)), (losses(tmp_path / "other"), later)):
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=2e-5)  # sums in float32


def test_ctrl_c_ends_every_rank(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start("small.toml", "--train.steps", "5000", "--run.checkpoint_every", "0")
    run.until((tmp_path / "runs" / "small-1" / "timeline.svg").exists)
    ranks = run.ranks()
    for pid in (run.process.pid, *ranks):  # as a terminal does: to all of them
        os.kill(pid, signal.SIGINT)
    assert run.wait(timeout_s=30) == 75
    assert not any(map(alive, ranks))
    said = run.err.splitlines()[-1]
    assert said.startswith("helixpipe: stopped by SIGTERM: no checkpoint was written after step ")
    assert said.endswith(", since run.checkpoint_every is 0")
    assert "Traceback" not in run.err


def test_ctrl_c_twice_ends_every_rank_at_once(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start("small.toml", "--train.steps", "5000", "--run.checkpoint_every", "0")
    run.until((tmp_path / "runs" / "small-1" / "timeline.svg").exists)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # a step that does not end
    os.kill(run.process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout_s=1)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait(timeout_s=20) == 130
    assert not any(map(alive, ranks))
    assert run.err.splitlines()[-1] == "helixpipe: interrupted; there is no checkpoint yet"
    assert "Traceback" not in run.err


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_the_same_command_goes_on(
    reference: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    """Twice, by each signal."""
    command = ["small.toml", "--run.folder", "here", "--run.resume", "auto", "--run.checkpoint_every", "1000"]
    steps: list[int] = []
    for asked, until in ((signal.SIGTERM, 2), (signal.SIGUSR1, 7)):
        run = start(*command)
        run.until(lambda: f"step {until}/{STEPS}" in run.err)  # noqa: B023
        run.process.send_signal(asked)
        assert run.wait() == 75, run.err
        written = sorted(path.name for path in (tmp_path / "here" / "checkpoints").iterdir())
        steps.append(int(written[-1].removeprefix("step-")))
        assert len(written) == len(steps)
        assert run.err.splitlines()[-1] == (
            f"helixpipe: stopped by {asked.name}: step {steps[-1]} is in its checkpoint, and --resume here goes on from there"
        )
        assert ("starting from the beginning" in run.err) == (len(steps) == 1)
    assert steps[0] < steps[1] < STEPS
    again = start(*command)
    assert again.wait() == 0, again.err
    assert losses(tmp_path / "here") == losses(reference)
    done = start(*command)  # once more: nothing is left to do
    assert done.wait() == 0, done.err
    assert losses(tmp_path / "here") == losses(reference)


def test_under_torchrun_ranks_join_and_a_killed_one_is_started_again(
    reference: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    """Each rank is killed once; the losses are as if none was."""
    command = [*TORCHRUN[:3], "--max-restarts", "2", *TORCHRUN[3:]]
    run = start("train", "small.toml", "--run.folder", "here", "--run.resume", "auto", command=command)
    for count, step in enumerate((3, 6)):
        run.until((tmp_path / "here" / "checkpoints" / f"step-{step:08d}").exists)
        children = run.ranks()
        assert len(children) == 2
        os.kill(children[count], signal.SIGKILL)
    assert run.wait() == 0, run.err
    assert losses(tmp_path / "here") == losses(reference)
    assert run.out.count(f"trained to step {STEPS}") == 1


def test_two_runs_in_one_folder_are_one_and_a_refusal(tmp_path: Path, start: Callable[..., Run]) -> None:
    first = start("small.toml", "--run.folder", "here", "--train.steps", "5000")
    first.until(lambda: manifest.checkpoints(tmp_path / "here" / "checkpoints"))
    second = Run(tmp_path / "second", "--resume", str(tmp_path / "here"))
    assert second.wait(60) == 2
    assert second.err.splitlines()[-1] == (
        f"helixpipe: error: run.folder: '{tmp_path}/here' is in use by process {first.process.pid} on "
        f"{socket.gethostname()}; wait for it or stop it, or choose another folder"
    )
    first.process.kill()


def test_two_runs_at_once_take_two_numbers(tmp_path: Path, start: Callable[..., Run]) -> None:
    few = ["small.toml", "--train.steps", "3", "--run.checkpoint_every", "0", "--schedule.ranks", "1"]
    runs = [start(*few), start(*few)]
    assert [run.wait() for run in runs] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small-1", "small-2"]


def test_a_rank_that_stands_still_is_named_in_time(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start("small.toml", "--train.steps", "5000", "--run.checkpoint_every", "0", "--runtime.timeout_s", "4")
    run.until((tmp_path / "runs" / "small-1" / "timeline.svg").exists)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    assert run.wait(timeout_s=30) == 2
    assert not any(map(alive, ranks))
    told = [line for line in run.err.splitlines() if line.startswith("helixpipe:")]
    assert len(told) == 1
    assert told[0].startswith("helixpipe: error: rank 0")
    assert "rank 1" in told[0]
    assert "Traceback" not in run.err


def test_on_a_disk_that_is_full_a_run_goes_on_and_fails_where_its_last_checkpoint_does(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "1400k"):
        run = start("small.toml", "--run.folder", "disk/run", "--run.keep", "9")
        assert run.wait() == 2
        assert f"step {STEPS}/{STEPS}  loss " in run.err
        *told, last = [line for line in run.err.splitlines() if line.startswith("helixpipe:")]
        newest = sorted((disk / "run" / "checkpoints").iterdir())[-1]
        full = " could not write: no space left on device; "
        assert last.startswith(f"helixpipe: error: checkpoint of step {STEPS}: rank ")
        assert last.endswith(f"{full}the last good one is {newest}; --resume continues it")
        failed = [line for line in told if full in line]
        assert failed  # more than one was tried
        assert all(line.endswith(f"training goes on, and the last good one is {newest.name}") for line in failed)
        assert "Traceback" not in run.err
        assert manifest.verify(newest).step >= 3


def test_a_port_in_use_is_one_line_and_nothing_is_written(tmp_path: Path, start: Callable[..., Run]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start("small.toml", "--runtime.port", str(port))
        assert run.wait() == 2
    assert run.err == (
        f"helixpipe: error: runtime.port: {port} cannot be used: address already in use; choose another, or 0 for any free one\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.step", "3"], "--train.step: no such key; did you mean 'steps'?"),
        (["nowhere.toml"], "nowhere.toml: cannot be read: No such file or directory; give the path of a TOML file"),
        (["--model.heads", "5"], "model.heads: 5 heads do not divide hidden size 128; choose a divisor or set model.head_dim"),
        (["--data.path", "/nowhere"], "data.path: '/nowhere' does not exist; give a text file, a folder of them, or .npy/.bin tokens"),
        (["--data.path", "chat.jsonl"], "data.path: 'chat.jsonl' is JSON lines, neither text nor tokens; make tokens of it: helixpipe prepare"),
        (["--resume", "runs/none"], "--resume runs/none: no such folder; give a run folder or one of its checkpoints"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, start: Callable[..., Run], arguments: list[str], message: str
) -> None:
    (tmp_path / "chat.jsonl").write_text('{"text": "hello"}\n' * 1000)
    run = start(*arguments)
    assert run.wait(20) == 2
    assert (run.err, run.out) == (f"helixpipe: error: {message}\n", "")
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_a_number_is_one_line(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start(
        "small.toml", "--schedule.ranks", "1", "--train.learning_rate", "1e30", "--train.clip_norm", "0",
        "--train.warmup_steps", "0", "--train.weight_decay", "1e30",
    )  # fmt: skip
    assert run.wait() == 2
    said = run.err.splitlines()[-1]
    assert said.startswith("helixpipe: error: step 2: loss nan, gradient norm ")
    assert ": the first value that is not finite came from " in said
    assert said.endswith(
        ", on rank 0, which was not finite before the step; lower train.learning_rate or train.clip_norm, or set "
        "train.on_nonfinite to skip"
    )
