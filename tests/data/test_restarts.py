"""The output is the same bytes whatever the workers, and however often the command was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from making import PLANES, WORDS, byte_level, documents, own, prepare, tree, write_lines, write_tokenizer

from helixpipe.cli import main
from helixpipe.data import records

# small units, in a process that can be killed; with TRICKLE every unit takes a while
CODE = """
import sys, time
from helixpipe.data import records, journal
records.UNIT_BYTES = 3000
add = journal.Journal.add
def slowly(self, done):
    add(self, done)
    time.sleep(0.02)
journal.Journal.add = slowly
from helixpipe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def write_inputs(folder: Path) -> Path:
    draw = random.Random(0)
    folder.mkdir()
    texts = ["".join(draw.choices(WORDS + PLANES, k=draw.randrange(400))) for _ in range(60)]
    write_lines(folder / "a.jsonl", [{"text": text} for text in texts])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:20]}), folder / "b.parquet", row_group_size=9)
    for number in range(12):
        (folder / f"c{number:02}.txt").write_bytes((WORDS * number).encode())
    with (folder / "a.jsonl").open("a") as file:
        file.write("{bad\n" * 3 + '{"text": "after the bad"}\n')
    return folder


def command(inputs: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    given = [str(inputs), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", str(workers)]
    return [sys.executable, "-c", CODE, "prepare", *given, "--on-error", "skip"]


@pytest.fixture
def undisturbed(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(records, "UNIT_BYTES", 3000)
    prepare(tmp_path / "whole", tokenizer, write_inputs(tmp_path / "in"), "--on-error", "skip")
    return tree(tmp_path / "whole")


def test_workers_change_no_byte(tmp_path: Path, tokenizer: Path, undisturbed: dict[str, bytes]) -> None:
    assert sum(name.endswith(".tokens") for name in undisturbed) > 10
    for workers in (2, 3):
        done = subprocess.run(
            command(tmp_path / "in", tokenizer, tmp_path / f"out{workers}", workers), timeout=240, check=False
        )
        assert done.returncode == 0
        assert tree(tmp_path / f"out{workers}") == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_restarted_the_output_is_the_same(
    tmp_path: Path, tokenizer: Path, undisturbed: dict[str, bytes], workers: int
) -> None:
    draw, killed, kept = random.Random(workers), 0, set[int]()
    output = tmp_path / "out"
    for _ in range(3):
        running = subprocess.Popen(
            command(tmp_path / "in", tokenizer, output, workers), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        until = len(kept) + draw.randrange(1, 5)
        limit_s = time.monotonic() + 120
        while journaled(output) <= until and running.poll() is None and time.monotonic() < limit_s:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        os.kill(running.pid, signal.SIGKILL)
        killed += running.wait() == -signal.SIGKILL
        kept = set(range(journaled(output)))
        assert not (output / "manifest.json").exists()
        with (output / "journal.jsonl").open("ab") as file:  # as if it had been killed within a line
            file.write(b'{"bad":0,"la')
        (output / "00099-000.tokens.77.part").write_bytes(b"half")
    assert killed == 3
    done = subprocess.run(
        command(tmp_path / "in", tokenizer, output, workers), capture_output=True, text=True, timeout=240, check=True
    )
    assert "goes on from " in done.stderr
    assert tree(output) == undisturbed


def journaled(output: Path) -> int:
    try:
        return (output / "journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_workers_end_with_the_command(tmp_path: Path, tokenizer: Path) -> None:
    """Nobody would journal what they write."""
    code = CODE.replace("time.sleep(0.02)", "time.sleep(60)")
    given = command(write_inputs(tmp_path / "in"), tokenizer, tmp_path / "out", 2)
    given[2] = code
    running = subprocess.Popen(given, stderr=subprocess.DEVNULL)
    limit_s = time.monotonic() + 120
    while journaled(tmp_path / "out") < 2 and time.monotonic() < limit_s:
        time.sleep(0.01)
    workers = children(running.pid)
    assert len(workers) >= 2
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    while any(alive(worker) for worker in workers) and time.monotonic() < limit_s:
        time.sleep(0.01)
    assert not any(alive(worker) for worker in workers)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fails(capsys: pytest.CaptureFixture[str], output: Path, tokenizer: Path, *arguments: object) -> str:
    capsys.readouterr()
    given = ["prepare", *map(str, arguments), "--tokenizer", str(tokenizer), "--output", str(output)]
    assert main([*given, "--workers", "1"]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("helixpipe: error: ")


def test_another_command_s_folder_is_left_alone(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, {"text": 3}]), tmp_path / "out"
    for whole in (False, True):
        if whole:
            prepare(out, tokenizer, file, "--on-error", "skip")
        else:
            assert "field 'text' is a number (3), not text" in fails(capsys, out, tokenizer, file)
            assert (out / "journal.jsonl").exists()
        before = tree(out)
        for arguments, said in (
            ([file, "--min-tokens", "2"], "min tokens: 1, now 2"),
            ([file, "--text", "body"], "text: text, now body"),
            ([file, "--end-token", "none"], "end: 0, now None"),
            ([file, file], "inputs"),
        ):
            assert fails(capsys, out, tokenizer, *arguments) == (
                f"--output: '{out}' was begun with other {said}; give a new folder"
            )
        assert tree(out) == before
    for change in ("config", "vocabulary"):  # the chat template and the end token are in the files beside
        made = write_tokenizer(
            tmp_path / change, byte_level(500 if change == "vocabulary" else 400), model_max_length=9
        )
        assert fails(capsys, out, made, file) == f"--output: '{out}' was begun with other tokenizer; give a new folder"
    changed = tmp_path / "b.jsonl"
    changed.write_text('{"text": "x"}\n')
    prepare(tmp_path / "b", tokenizer, changed)
    changed.write_text('{"text": "xy"}\n')
    assert fails(capsys, tmp_path / "b", tokenizer, changed).endswith("was begun with other inputs; give a new folder")


def test_folders_that_are_something_else(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_lines(tmp_path / "in.jsonl", [{"text": "good"}]), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert fails(capsys, out, tokenizer, file) == f"--output: '{out}' has other files ('mine.txt'); give a new folder"
    assert tree(out) == {"mine.txt": b"mine"}
    (out / "manifest.json").write_text("{}")
    assert fails(capsys, out, tokenizer, file) == (
        f"--output: '{out}' has a manifest.json of something else; give a new folder"
    )
    assert fails(capsys, file, tokenizer, file) == f"--output: '{file}' is no folder; give one"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert fails(capsys, folder / "out", tokenizer, folder) == (
        f"--output: '{folder}/out' is in the input '{folder}'; give a folder outside of it"
    )


def test_one_command_at_a_time(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    file, out = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, {"text": 3}]), tmp_path / "out"
    fails(capsys, out, tokenizer, file)
    with (out / "journal.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert fails(capsys, out, tokenizer, file, "--on-error", "skip") == (
            f"--output: another command is writing '{out}'; let it end, or stop it"
        )
    assert documents(prepare(out, tokenizer, file, "--on-error", "skip")) == own(tokenizer, ["good"])


def test_a_line_that_was_passed_over_stops_a_command_that_stops(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", 30)
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_lines(file, [{"text": "one"}, {"text": 2}, {"text": "three"}, {"text": "four"}])
    with monkeypatch.context() as patch:
        patch.setattr(
            "helixpipe.data.prepare._check_unchanged", lambda inputs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        given = ["prepare", str(file), "--tokenizer", str(tokenizer), "--output", str(out), "--on-error", "skip"]
        assert main([*given, "--workers", "1"]) == 130
    assert fails(capsys, out, tokenizer, file).startswith(f"{file}:2: field 'text' is a number (2), not text")
    found = prepare(out, tokenizer, file, "--on-error", "skip")
    assert documents(found) == own(tokenizer, ["one", "three", "four"])


def test_an_input_that_changes_meanwhile_is_named(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helixpipe.data import journal

    file = write_lines(tmp_path / "a.jsonl", [{"text": "good"}])
    add = journal.Journal.add

    def changing(self: journal.Journal, done: object) -> None:
        add(self, done)  # type: ignore[arg-type]
        with file.open("a") as more:
            more.write(json.dumps({"text": "more"}) + "\n")

    monkeypatch.setattr(journal.Journal, "add", changing)
    assert fails(capsys, tmp_path / "out", tokenizer, file) == (
        f"'{file}' changed while it was prepared; prepare it anew, to a new folder"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_line_is_told_whichever_worker_meets_one_first(
    tmp_path: Path, tokenizer: Path, workers: int
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": WORDS * 300}) + "\n{bad\n" + '{"text": "x"}\n' * 300 + "{worse\n")
    given = [*command(file, tokenizer, tmp_path / "out", workers)[:-2]]
    done = subprocess.run(given, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert f"{file}:2: is not JSON" in done.stderr.splitlines()[-1]
