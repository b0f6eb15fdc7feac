"""Jobs: which run a command line means, and every refusal before anything is started or written."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from helixpipe.config import Config, ScheduleConfig
from helixpipe.config_text import Table, build_config, parse_arguments, to_table, write_toml
from helixpipe.errors import CheckpointError, ConfigError, DataError, HelixpipeError
from helixpipe.train import manifest
from helixpipe.train.data import open_corpus
from helixpipe.train.job import Job, _resolved, prepare, prepare_evaluation
from helixpipe.train.manifest import Manifest

LONG = "x" * 300
"""No file system has such a name, and asking for it is an error of its own."""
TEXT = (bytes(range(1, 256)) + b"\n") * 400


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[Job, list[str]]:
    said: list[str] = []
    return prepare(arguments, said.append), said


def made(
    folder: str, step: int, over: Table | None = None, data: tuple[int, ...] = (), batches: int | None = None
) -> Path:
    """A run folder with a checkpoint (of no tensors) at a step. `batches`: an earlier version's, which evaluated so many."""
    config = build_config(over or {})
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder="/moved/since", name="mine"))
    checkpoints = Path(folder, "checkpoints").resolve()
    temporary = checkpoints / manifest.temporary_name(step)
    temporary.mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(b"tensors")
    files = {"__0_0.distcp": manifest.seal(temporary / "__0_0.distcp")}
    Path(folder, "config.toml").write_text(write_toml(config))
    saved = to_table(config)
    if batches is not None:
        del saved["train"]["evaluate_sequences"]
        saved["train"]["evaluate_batches"] = batches
    return manifest.finish(temporary, Manifest(step, dataclasses.asdict(config.shape()), saved, files, data))


def test_a_new_run_has_a_folder_of_its_own_number(elsewhere: Path) -> None:
    job, said = run()
    assert (job.folder, job.checkpoint, job.step, said) == (elsewhere / "runs" / "default-1", None, 0, [])
    for name in ("default-1", "default-9", "default-10", "other-77", "default-x"):
        (elsewhere / "runs" / name).mkdir(parents=True)
    assert run()[0].folder == elsewhere / "runs" / "default-11"
    (elsewhere / "mine.toml").write_text("[train]\nsteps = 3\n")
    assert run("mine.toml")[0].folder == elsewhere / "runs" / "mine-1"
    assert run("--run.name", "other")[0].folder == elsewhere / "runs" / "other-78"
    assert run("--run.folder", "here")[0].folder == elsewhere / "here"


def test_preparing_writes_nothing(elsewhere: Path) -> None:
    run()
    assert list(elsewhere.iterdir()) == []


def test_a_job_travels_as_text() -> None:
    made("runs/default-1", 50)
    for arguments in ((), ("--resume",)):
        job, _ = run(*arguments, "--schedule.folds", "1", "--train.betas", "0.5", "0.6")
        assert Job.from_json(job.to_json()) == job


def test_a_bare_resume_means_the_newest_run_and_its_newest_good_checkpoint(elsewhere: Path) -> None:
    made("runs/default-1", 70)
    made("runs/default-2", 50, {"train": {"seed": 3}})
    last = made("runs/default-2", 100)
    (last / "__0_0.distcp").write_bytes(b"tensorS")
    job, said = run("--resume")
    assert job.folder == elsewhere / "runs" / "default-2"
    assert (job.checkpoint, job.step) == (elsewhere / "runs/default-2/checkpoints/step-00000050", 50)
    assert said == [
        "a bad checkpoint is passed over: runs/default-2/checkpoints/step-00000100/__0_0.distcp: corrupted, "
        "its checksum differs"
    ]
    assert job.config.train.seed == 3  # the config it was saved with


def test_resume_with_a_path_continues_that_run_in_place_or_as_another(elsewhere: Path) -> None:
    path = made("a", 50)
    for given in ("a", "a/checkpoints", str(path)):
        assert run("--resume", given)[0].folder == elsewhere / "a"
    job, _ = run("--resume", "a", "--run.folder", "b")
    assert (job.folder, job.checkpoint) == (elsewhere / "b", path)
    assert run("--resume", "--run.folder", "a")[0].checkpoint == path


def test_other_data_than_the_checkpoints_is_said_in_one_line(elsewhere: Path) -> None:
    (elsewhere / "text").write_bytes(TEXT)
    over: Table = {"data": {"path": str(elsewhere / "text")}, "train": {"evaluate_sequences": 9}}
    training, held_out, checksum = open_corpus(build_config(over)).fingerprint()
    assert training + held_out == 102_400
    for i, (data, said) in enumerate({
        (): [],
        (training, held_out, checksum): [],
        (training, held_out, checksum + 1): [
            f"continuing with other data: {training:,} tokens and {held_out:,} held out, not the same ones"
        ],
        (90_000, 1_000, checksum): [
            "continuing with other data: 90,000 tokens and 1,000 held out -> "
            f"{training:,} tokens and {held_out:,} held out"
        ],
    }.items()):  # fmt: skip
        made(f"run-{i}", 50, over, data)
        assert run("--resume", f"run-{i}")[1] == said


def test_what_is_remarkable_about_the_data_is_said_once(elsewhere: Path) -> None:
    (elsewhere / "text").write_bytes(TEXT)
    nine = "--train.evaluate_sequences", "9"
    _, said = run("--data.path", "text", "--model.vocabulary", "50257", *nine)
    assert said == [
        "data.path: text is read as bytes, which are 256 of the 50257 words of model.vocabulary; "
        "set it to 256, or give tokens of its tokenizer as .npy or .bin"
    ]
    assert run("--data.path", "text", *nine)[1] == []
    assert run("--data.path", "text")[1] == [
        "train.evaluate_sequences: 16, and the 10,240 tokens held out have room for 9 of 1,024 side by side: 9 will be evaluated"
    ]
    assert run("--data.path", "text", "--data.held_out", "0")[1] == []


def test_data_is_known_by_all_of_it(elsewhere: Path) -> None:
    found = set()
    for changed in (0, 40_000, 80_000):
        text = bytearray(TEXT)
        text[changed : changed + 7_000] = b"x" * 7_000
        (elsewhere / "text").write_bytes(text)
        found.add(open_corpus(build_config({"data": {"path": "text"}})).fingerprint())
    assert len(found) == 3


def test_paths_mean_the_same_wherever_a_run_is_continued(elsewhere: Path) -> None:
    (elsewhere / "text").write_bytes(TEXT)
    assert run("--data.path", "text")[0].config.data.path == str(elsewhere / "text")
    # a profile is read where a config is made, so this one is not
    config = Config(schedule=ScheduleConfig(profile="mine.json"))
    assert _resolved(config, parse_arguments([]), None)[0].schedule.profile == str(elsewhere / "mine.json")
    assert run()[0].config.schedule.profile == ""


def test_a_file_or_an_option_goes_before_the_saved_config_and_changes_are_said() -> None:
    made("a", 50, {"schedule": {"folds": 1}, "train": {"seed": 3}})
    job, said = run("--resume", "a", "--schedule.family", "1f1b", "--train.seed", "4")
    assert (job.config.schedule.family, job.config.schedule.folds) == ("1f1b", None)
    assert said == [
        "continuing with changes: schedule.family helix -> 1f1b, schedule.folds 1 -> unset, train.seed 3 -> 4"
    ]
    Path("new.toml").write_text("[train]\nsteps = 200\n")
    assert run("new.toml", "--resume", "a")[0].config.train.seed == 0


def test_another_precision_is_a_change_and_other_threads_are_none() -> None:
    made("a", 50, {"runtime": {"dtype": "bfloat16", "threads": 2, "recompute": "none"}})
    assert run("--resume", "a", "--runtime.threads", "1", "--runtime.recompute", "full")[1] == []
    _, said = run("--resume", "a", "--runtime.dtype", "float32")
    assert said == ["continuing with changes: runtime.dtype bfloat16 -> float32"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--resume", "nowhere"],
            CheckpointError,
            "--resume nowhere: no such folder; give a run folder or one of its checkpoints",
        ),
        (
            ["--resume", "empty"],
            CheckpointError,
            "--resume: no checkpoint in empty/checkpoints; start anew without --resume, in a new folder",
        ),
        (
            ["--run.folder", "used"],
            ConfigError,
            "run.folder: '{}/used' has a run already; continue it with --resume or choose another folder",
        ),
        (
            ["--resume", "used", "--run.folder", "empty-run"],
            ConfigError,
            "run.folder: '{}/empty-run' has a run already; continue it with --resume or choose another folder",
        ),
        (["--run.folder", "file"], ConfigError, "run.folder: '{}/file' is a file; choose another folder"),
        (
            ["--run.name", "a/b"],
            ConfigError,
            "run.name: 'a/b' will not do for a folder; use letters, digits and dashes, 200 at most",
        ),
        (
            ["--run.name", LONG],
            ConfigError,
            f"run.name: '{LONG}' will not do for a folder; use letters, digits and dashes, 200 at most",
        ),
        (["--run.folder", LONG], ConfigError, f"run.folder: '{{}}/{LONG}' cannot be made: file name too long"),
        (["--data.path", LONG], DataError, f"data.path: '{LONG}' cannot be read: file name too long"),
        (
            ["--resume", LONG],
            CheckpointError,
            f"--resume {LONG}: file name too long; give a run folder or one of its checkpoints",
        ),
        (
            ["--resume", "--run.folder", LONG],
            CheckpointError,
            f"--resume {LONG}: file name too long; give a run folder or one of its checkpoints",
        ),
        (
            ["--resume", "used", "--train.steps", "50"],
            ConfigError,
            "train.steps: 50, and {}/used/checkpoints/step-00000050 has done 50; raise it to continue",
        ),
        (
            ["--resume", "used", "--model.layers", "6"],
            CheckpointError,
            "{}/used/checkpoints/step-00000050: its model.layers is 4, and the config's 6; use the same model",
        ),
        (
            ["--data.path", "nowhere"],
            DataError,
            "data.path: 'nowhere' does not exist; give a text file, a folder of them, or .npy/.bin tokens",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    elsewhere: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    made("used", 50)
    (elsewhere / "empty").mkdir()
    (elsewhere / "empty-run" / "checkpoints").mkdir(parents=True)
    (elsewhere / "file").touch()
    with pytest.raises(error) as caught:
        run(*arguments)
    assert str(caught.value) == message.replace("{}", str(elsewhere))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "locked/text"], "data.path: 'locked/text' cannot be read: permission denied"),
        (["--run.folder", "locked/run"], "run.folder: '{}/locked/run' cannot be made: permission denied"),
        (
            ["--resume", "locked/run"],
            "--resume locked/run: permission denied; give a run folder or one of its checkpoints",
        ),
    ],
)
def test_a_folder_that_may_not_be_looked_into_is_one_line(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    stat = os.stat

    def locked(path: str, **given: bool) -> os.stat_result:  # whoever is root may look anywhere
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **given)

    monkeypatch.setattr(os, "stat", locked)
    with pytest.raises(HelixpipeError) as caught:
        run(*arguments)
    assert str(caught.value) == message.replace("{}", str(elsewhere))


def test_torchrun_must_start_as_many_ranks_as_the_schedule_has() -> None:
    with pytest.raises(ConfigError) as caught:
        prepare([], lambda line: None, ranks=3)
    assert str(caught.value) == "schedule.ranks: 2, and torchrun started 3 processes; make them the same"


def test_torchrun_must_start_as_many_ranks_as_the_mesh_has() -> None:
    assert prepare(["--mesh.dp", "3"], lambda line: None, ranks=6).config.mesh_shape().size == 6
    with pytest.raises(ConfigError) as caught:
        prepare(["--mesh.dp", "2"], lambda line: None, ranks=2)
    assert str(caught.value) == (
        "mesh: pp 2 x dp 2 are 4 ranks, and torchrun started 2 processes; start 4, or choose schedule.ranks, mesh.dp, "
        "mesh.cp and mesh.tp that multiply to 2"
    )


def test_no_good_checkpoint_is_an_error() -> None:
    (made("a", 50) / "__0_0.distcp").unlink()
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"^--resume: no good checkpoint in a/checkpoints; start anew without"):
        prepare(["--resume", "a"], said.append)
    assert len(said) == 1


def evaluation(*arguments: str) -> tuple[Job, list[str]]:
    said: list[str] = []
    return prepare_evaluation(arguments, said.append), said


def test_an_evaluation_is_of_a_checkpoint_under_any_layout_and_writes_nothing(elsewhere: Path) -> None:
    path = made("a", 120, {"train": {"seed": 3}})  # all its steps are done
    before = sorted(elsewhere.rglob("*"))
    job, said = evaluation("--resume", "a", "--schedule.ranks", "1", "--mesh.cp", "4", "--json")
    assert (job.checkpoint, job.step, job.task, job.as_json, said) == (path, 120, "evaluate", True, [])
    assert job.config.mesh_shape().size == 4
    assert job.config.train.seed == 3  # the config it was saved with
    assert Job.from_json(job.to_json()) == job
    (elsewhere / "other.toml").write_text("[schedule]\nfamily = '1f1b'\n")
    job, said = evaluation("other.toml", "--resume", str(path))
    assert (job.config.schedule.family, job.config.train.seed, job.as_json, said) == ("1f1b", 0, False, [])
    assert sorted(elsewhere.rglob("*")) == sorted([*before, elsewhere / "other.toml"])
    made("runs/default-7", 50)
    assert evaluation("--json", "--resume")[0].step == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "--resume: missing, and random weights tell nothing; give --resume RUN_OR_CHECKPOINT, or --model.path FOLDER",
        ),
        (["--resume", "b"], "--resume b: no such folder; give a run folder or one of its checkpoints"),
        (["--resume"], "--resume: no run runs/default-<number> here; give --resume PATH or --run.folder"),
        (
            ["--resume", "a", "--data.held_out", "0"],
            "data.held_out: 0, so there is nothing to evaluate on; give a share of the data, such as 0.1",
        ),
        (
            ["--resume", "a", "--data.path", "short"],
            "data.path: 'short' leaves 300 tokens held out, fewer than a sequence and its next token (1025); "
            "raise data.held_out, set it to 0, or give more data",
        ),
        (
            ["--resume", "a", "--model.layers", "3"],
            "{}/a/checkpoints/step-00000050: its model.layers is 4, and the config's 3; use the same model",
        ),
        (
            ["--resume", "a", "--jsno"],
            "--jsno: no such section; known: model, schedule, mesh, data, train, runtime, run",
        ),
        (["--resume", "a", "--train.evaluate_sequences", "0"], "train.evaluate_sequences: 0; give at least 1"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(elsewhere: Path, arguments: list[str], message: str) -> None:
    made("a", 50)
    (elsewhere / "short").write_bytes(b"x" * 3000)
    with pytest.raises(HelixpipeError) as caught:
        evaluation(*arguments)
    assert str(caught.value) == message.replace("{}", str(elsewhere))


def test_an_evaluation_on_other_data_than_the_run_s_is_said(elsewhere: Path) -> None:
    (elsewhere / "text").write_bytes(TEXT)
    over: Table = {"data": {"path": str(elsewhere / "text")}, "train": {"sequence_length": 64}}
    made("a", 50, over, open_corpus(build_config(over)).fingerprint())
    assert evaluation("--resume", "a")[1] == []
    assert evaluation("--resume", "a", "--data.held_out", "0.2")[1] == [
        "evaluating with other data: 92,160 tokens and 10,240 held out -> 81,920 tokens and 20,480 held out"
    ]
    assert evaluation(
        "--resume", "a", "--runtime.dtype", "float64", "--model.rope_base", "5e5", "--runtime.threads", "2"
    )[1] == ["evaluating with changes: model.rope_base unset -> 500000.0, runtime.dtype float32 -> float64"]
    with pytest.raises(ConfigError, match=r"^schedule.ranks"):
        prepare_evaluation(["--resume", "a"], print, 3)


def test_what_was_frozen_in_training_does_not_matter() -> None:
    path = made("a", 50, {"train": {"freeze": ["embed*"]}})
    Path("plain.toml").write_text("")
    assert evaluation("plain.toml", "--resume", "a")[0].checkpoint == path
    with pytest.raises(CheckpointError, match="freeze the same parameters"):
        run("plain.toml", "--resume", "a")


def test_checkpoints_of_an_earlier_version_go_on_with_as_many_held_out_sequences() -> None:
    over: Table = {"schedule": {"microbatches": 8}, "train": {"microbatch_size": 2}, "mesh": {"dp": 2}}
    made("a", 50, over, batches=3)
    for job, said in (run("--resume", "a"), evaluation("--resume", "a")):
        assert (job.config.train.evaluate_sequences, said) == (3 * 8 * 2 * 2, [])
