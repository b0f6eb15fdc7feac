"""`helixpipe evaluate` as a user runs it: of a run, under other layouts, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import TORCHRUN, Run, alive, metrics

pytestmark = pytest.mark.timeout(290)

EVALUATE = [sys.executable, "-m", "helixpipe", "evaluate"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run: its folder."""
    run = Run(tmp_path_factory.mktemp("reference"), "small.toml", "--train.steps", "6", "--run.checkpoint_every", "3")
    assert run.wait() == 0, run.err
    return run.folder / "runs" / "small-1"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder in it."""
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def test_a_run_s_last_loss_is_told_again_under_its_own_layout(reference: Path, start: Callable[..., Run]) -> None:
    """Bit for bit, as a table of at most 80 columns; nothing of the run is touched."""
    before = contents(reference)
    run = start("--resume", str(reference), command=EVALUATE)
    assert run.wait() == 0, run.err
    last = metrics(reference)[-1]
    lines = run.out.splitlines()
    assert lines[0] == f"held-out loss of {reference}/checkpoints/step-00000006"
    assert lines[2] == f"loss         {last['held_out_loss']:.4f} nats a token"
    assert lines[4] == "tokens       256 counted, in 4 sequences of 64"
    assert [line.split() for line in lines[6:]] == [
        ["position", "loss", "tokens"],
        *(
            [*at.split(), f"{loss:.4f}", str(tokens)]
            for at, loss, tokens in zip(
                ("0", "1", "2 to 3", "4 to 7", "8 to 15", "16 to 31", "32 to 63"),
                last["held_out_loss_by_position"],
                (4, 4, 8, 16, 32, 64, 128),
                strict=True,
            )
        ),
    ]
    assert max(map(len, lines[1:])) <= 80
    assert run.err.splitlines() == [
        "tiny: 41,184 parameters, 3 layers; helix on 2 ranks (cpu), 4 micro-batches of 1 x 64 tokens",
        f"weights of {reference}/checkpoints/step-00000006, step 6",
    ]
    assert contents(reference) == before
    assert sorted(path.name for path in run.folder.iterdir()) == ["err", "out", "small.toml"]


@pytest.mark.parametrize(
    "layout",
    [
        "--schedule.family gpipe --schedule.ranks 1 --train.microbatch_size 3 --schedule.microbatches 2",
        "--schedule.ranks 1 --schedule.folds 1 --mesh.cp 2",
    ],
)
def test_another_layout_gives_the_same_loss(reference: Path, start: Callable[..., Run], layout: str) -> None:
    run = start("small.toml", "--resume", str(reference), *layout.split(), "--json", command=EVALUATE)
    assert run.wait() == 0, run.err
    assert run.out.count("\n") == 1
    told, last = json.loads(run.out), metrics(reference)[-1]
    assert told["loss"] == pytest.approx(last["held_out_loss"], rel=1e-6)
    by_position = told["by_position"]
    assert [each["loss"] for each in by_position] == pytest.approx(last["held_out_loss_by_position"], rel=1e-6)
    assert [(each["first"], each["last"], each["tokens"]) for each in by_position][-2:] == [(16, 31, 64), (32, 63, 128)]
    assert (told["step"], told["tokens"], told["sequences"], told["sequence_length"]) == (6, 256, 4, 64)
    assert told["weights"] == f"{reference}/checkpoints/step-00000006"


def test_under_torchrun_ranks_join(reference: Path, start: Callable[..., Run]) -> None:
    run = start("evaluate", "--resume", str(reference), "--json", command=TORCHRUN)
    assert run.wait() == 0, run.err
    assert json.loads(run.out)["loss"] == metrics(reference)[-1]["held_out_loss"]


def test_ctrl_c_ends_every_rank_and_leaves_nothing(reference: Path, start: Callable[..., Run]) -> None:
    before = contents(reference)
    run = start("--resume", str(reference), "--train.evaluate_sequences", "1000000", command=EVALUATE)
    run.until(lambda: "weights of" in run.err)
    ranks = run.ranks()
    assert len(ranks) == 2
    for pid in (run.process.pid, *ranks):  # as a terminal does: to all of them
        os.kill(pid, signal.SIGINT)
    assert run.wait(timeout_s=10) == 130
    assert not any(map(alive, ranks))
    assert run.err.splitlines()[-1] == "helixpipe: interrupted"
    assert "Traceback" not in run.err
    assert run.out == ""
    assert contents(reference) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--resume: missing, and random weights tell nothing; give --resume RUN_OR_CHECKPOINT, or --model.path FOLDER"),
        (["small.toml", "--resume", "nowhere"], "--resume nowhere: no such folder; give a run folder or one of its checkpoints"),
        (["--resume", "{}", "--data.held_out", "0", "--json"], "data.held_out: 0, so there is nothing to evaluate on; give a share of the data, such as 0.1"),
        (["--resume", "{}", "--model.hidden", "64"], "{}/checkpoints/step-00000006: its model.hidden is 32, and the config's 64; use the same model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(reference: Path, start: Callable[..., Run], arguments: list[str], message: str) -> None:
    run = start(*(word.replace("{}", str(reference)) for word in arguments), command=EVALUATE)
    assert run.wait(60) == 2
    assert run.out == ""
    assert run.err.count("\n") == 1
    assert run.err == f"helixpipe: error: {message.replace('{}', str(reference))}\n"
