"""No room for what prepare writes: one line, and the same command goes on once there is some."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk
from making import documents, prepare, refused, write_lines

from helixpipe.data import records
from helixpipe.data.prepared import Prepared


def test_no_space_is_one_line_and_what_is_written_is_gone_on_from(tmp_path: Path, tokenizer: Path) -> None:
    """A limit on the size of files stands for a disk that is full: both make a write fail in the middle."""
    file = write_lines(tmp_path / "a.jsonl", [{"text": "some words " * 20}] * 200)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from helixpipe.cli import main; from helixpipe.data import records; records.UNIT_BYTES = 20_000\n"
        "import helixpipe.data.prepare as p; carry = p._carry\n"
        "def small(*given): carry(*given); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "p._carry = small\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    given = ["prepare", str(file), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"helixpipe: error: --output: '{tmp_path}/out' cannot be written: file too large; "
        "make room and give the same command again: it goes on from what is written"
    )
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_full_disk_leaves_what_is_done(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", 500)
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"line {i} " * 9} for i in range(60)])
    whole = documents(prepare(tmp_path / "whole", tokenizer, file))
    sync, left = os.fsync, [20]

    def full(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, os.strerror(28))
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert refused(capsys, tmp_path / "out", tokenizer, file) == (
            f"--output: '{tmp_path}/out' cannot be written: no space left on device; "
            "make room and give the same command again: it goes on from what is written"
        )
    kept = sorted(path.name for path in (tmp_path / "out").glob("*.tokens"))
    assert kept
    inodes = [(tmp_path / "out" / name).stat().st_ino for name in kept]
    assert documents(prepare(tmp_path / "out", tokenizer, file)) == whole
    assert [(tmp_path / "out" / name).stat().st_ino for name in kept][:-1] == inodes[:-1]
    assert len(Prepared.open(tmp_path / "out")) == 60


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "96k") as place:
        yield place


def test_a_disk_that_is_full_and_gets_room(
    disk: Path,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", 4000)
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"line {i} " * 40} for i in range(400)])
    whole = documents(prepare(tmp_path / "whole", tokenizer, file))
    output = disk / "out"
    assert refused(capsys, output, tokenizer, file) == (
        f"--output: '{output}' cannot be written: {os.strerror(errno.ENOSPC).lower()}; "
        "make room and give the same command again: it goes on from what is written"
    )
    kept = {path.name: path.stat().st_ino for path in output.glob("*.tokens")}
    assert kept
    assert not list(output.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True, timeout=60)
    assert documents(prepare(output, tokenizer, file)) == whole
    assert kept.items() <= {path.name: path.stat().st_ino for path in output.glob("*.tokens")}.items()
