"""Paths that no file system has, or that may not be looked into: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from helixpipe.cli import main
from helixpipe.config_text import build_config, read_toml
from helixpipe.data.inputs import find
from helixpipe.data.journal import Journal
from helixpipe.errors import ConfigError, DataError, HelixpipeError
from helixpipe.files import fault, make_folder, read_text, write_text
from helixpipe.hub.write import _carry

LONG = "missing/" + "x" * 300


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails; nothing is left of it."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" or words[0] == "show"  # which draws first
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert sorted(Path().rglob("*")) == before
    return lines[0].removeprefix("helixpipe: error: ")


MODEL = ["--model", "tiny", "--ranks", "2", "--sequence-length", "256"]
COMMANDS = {
    "train": [[], ["--run.folder"], ["--data.path"], ["--model.path"], ["--schedule.profile"], ["--resume"], ["--run.name"]],
    "evaluate": [["--resume"], ["--model.path"]],
    "export": [[], ["out"]],
    "prepare": [["--tokenizer"], ["text.txt", "--output"]],
    "plan": [["--model"], [*MODEL, "--config"], [*MODEL, "--data"]],
    "simulate": [["--model"], ["--data"], ["--profile"], ["--svg"]],
    "show": [["--csv"], ["--svg"]],
    "check": [[]],
    "compare": [[]],
    "profile": [["--out"], ["--model"]],
}  # fmt: skip
WORDS = [[name, *before] for name, each in COMMANDS.items() for before in each]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_null_byte_anywhere_on_a_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        said([*words, "a\0b"], capsys) == "'a\\x00b': a null byte, which nothing that is given may have; leave it out"
    )


KEYS: dict[str, dict[str, Any]] = {
    "run.folder": {"run": {"folder": "a\0b"}},
    "run.name": {"run": {"name": "a\0b"}},
    "run.resume": {"run": {"resume": "a\0b"}},
    "model.path": {"model": {"path": "a\0b"}},
    "model.adapter": {"model": {"adapter": "a\0b"}},
    "schedule.profile": {"schedule": {"profile": "a\0b"}},
    "data.path": {"data": {"path": "a\0b"}},
    "train.freeze": {"train": {"freeze": ["a\0b"]}},
}


@pytest.mark.parametrize("key", KEYS)
def test_a_null_byte_in_any_key_of_a_config(key: str, elsewhere: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{key}: .* has a null byte, which no path or name may have; leave it out$"
    ):
        build_config(KEYS[key])
    section, name = key.split(".")
    text = '["a\\u0000b"]' if key == "train.freeze" else '"a\\u0000b"'
    (elsewhere / "odd.toml").write_text(f"[{section}]\n{name} = {text}\n")
    with pytest.raises(ConfigError, match=rf"^odd.toml: {key}: .* null byte"):
        read_toml("odd.toml")


def test_a_null_byte_in_one_of_several_sources() -> None:
    with pytest.raises(ConfigError, match=r"^data.path: .* null byte"):
        build_config({"data": {"path": [{"path": "text.txt"}, {"path": "a\0b", "weight": 2.0}]}})


@pytest.mark.parametrize("read", [read_text, read_toml])
def test_a_null_byte_in_a_call(read: Any) -> None:
    with pytest.raises(HelixpipeError, match="cannot be read: embedded null byte"):
        read("a\0b")
    with pytest.raises(HelixpipeError, match="cannot be written: embedded null byte"):
        write_text("a\0b", "text")


SMALL = [
    "--data.path",
    "text.txt",
    "--train.steps",
    "1",
    "--schedule.ranks",
    "1",
    "--model.layers",
    "1",
    "--train.sequence_length",
    "64",
]
SMALLER = ["1f1b", "--ranks", "2", "--layers", "2", "--microbatches", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", *SMALL, "--run.folder", LONG], "run.folder: '{here}' cannot be made: file name too long"),
        (["train", *SMALL, "--resume", LONG], "--resume {given}: file name too long; give a run folder or one of its checkpoints"),
        (["train", *SMALL, "--data.path", LONG], "data.path: '{given}' cannot be read: file name too long"),
        (["train", *SMALL, "--model.path", LONG], "model.path: {given}: file name too long; give a folder with a config.json"),
        (["export", LONG, "out"], "{given}: file name too long; give a run folder or one of its checkpoints"),
        (["prepare", "text.txt", "--tokenizer", LONG, "--output", "out"], "--tokenizer: '{given}' cannot be read: file name too long"),
        (["profile", "--out", LONG], "--out: {given} cannot be written: file name too long"),
        (["show", *SMALLER, "--svg", LONG], "{given}: cannot be written: file name too long"),
        (["check", LONG + ".csv"], "{given}.csv: cannot be read: no such file or directory"),
    ],
    ids=lambda each: " ".join(each).replace(LONG, "LONG") if isinstance(each, list) else "",
)  # fmt: skip
def test_a_name_too_long_in_a_folder_that_is_missing(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(words, capsys) == message.format(given=LONG, here=f"{Path.cwd()}/{LONG}")


def test_a_folder_that_cannot_be_made_leaves_none_of_those_above_it(elsewhere: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        make_folder(Path("a/b") / ("x" * 300))
    assert not Path("a").exists()
    assert make_folder(Path("a/b")) == [Path("a/b"), Path("a")]
    assert fault("nowhere/name") == ""
    assert fault("text.txt/name") == ""


def test_a_link_to_itself(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("loop", "loop")
    assert said(["train", *SMALL, "--run.folder", "loop"], capsys).endswith("too many levels of symbolic links")
    with pytest.raises(HelixpipeError, match="loop: cannot be written: "):
        write_text("loop", "text")


@pytest.fixture
def unlisted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that may be entered and not listed: for root there is none, so that every way to list it is closed."""
    folder = elsewhere / "closed"
    for inside in ("", "checkpoints", "runs"):
        (folder / inside).mkdir()
    (folder / "config.toml").write_text("")
    (folder / "config.json").write_text("{}")

    def closing(original: Any) -> Any:
        def call(path: Any = ".", *more: Any) -> Any:
            if isinstance(path, str | os.PathLike) and "closed" in os.fspath(path):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return original(path, *more)

        return call

    monkeypatch.setattr(os, "listdir", closing(os.listdir))
    monkeypatch.setattr(os, "scandir", closing(os.scandir))
    return "closed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", *SMALL, "--resume", "closed"], "closed/checkpoints: permission denied"),
        (["train", *SMALL, "--run.folder", "closed", "--resume"], "closed/checkpoints: permission denied"),
        (["train", *SMALL, "--data.path", "closed"], "data.path: 'closed' cannot be read: Permission denied"),
        (["evaluate", "--resume", "closed"], "closed/checkpoints: permission denied"),
        (["export", "closed", "out"], "closed/checkpoints: permission denied"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_folder_that_may_be_entered_and_not_listed(
    unlisted: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter(()))  # what is left is looked at afterwards
    assert said(words, capsys) == message
    assert not Path("out").exists()


def test_what_prepare_may_not_list_or_make(unlisted: str, elsewhere: Path) -> None:
    with pytest.raises(DataError, match=r"^'closed' cannot be read: Permission denied$"):
        find([unlisted], Path("out"))
    with pytest.raises(HelixpipeError, match="file name too long"):
        Journal(Path(LONG), {}, {})
    assert not Path("missing").exists()


def test_an_export_that_may_not_list_what_it_takes_along_says_so(unlisted: str) -> None:
    Path("out").mkdir()
    with pytest.raises(HelixpipeError, match=r"^closed: what is in it cannot be listed: permission denied$"):
        _carry(Path(unlisted), Path("out"))
