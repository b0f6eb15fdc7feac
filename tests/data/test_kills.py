"""The command is killed at every call with which it changes the disk, and goes on to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from making import WORDS, prepare, tree, write_lines

from helixpipe.data import records

# each command is a fork of a process that has imported all it needs; it dies before the n-th call, the file that is
# being written half written
CODE = """
import os, signal, sys
from helixpipe.cli import main
from helixpipe.data import records
import helixpipe.commands.prepare, helixpipe.data.prepare, tokenizers

records.UNIT_BYTES = 900

def run(output, dies_at):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    calls = [0]

    def dying(name):
        call = getattr(os, name)

        def counted(first, *more, **named):
            calls[0] += 1
            if calls[0] == dies_at:
                if name == "fsync":
                    os.ftruncate(first, max(os.fstat(first).st_size - 5, 0))
                os.kill(os.getpid(), signal.SIGKILL)
            return call(first, *more, **named)

        setattr(os, name, counted)

    for name in ("fsync", "replace", "unlink", "mkdir"):
        dying(name)
    os._exit(main([*sys.argv[2:], "--output", output]))

for number in range(1, 200):
    output = f"{sys.argv[1]}/{number:03}"
    code = run(output, number)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert run(output, 0) == 0, output
"""


def test_killed_at_any_change_of_the_disk_the_output_is_the_same(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", 900)
    rows = [{"p": WORDS[: i % 7 * 9], "c": WORDS[i % 50 :]} for i in range(9)]
    inputs = write_lines(tmp_path / "a.jsonl", rows)
    options = ["--prompt", "p", "--completion", "c", "--workers", "1"]
    whole = tree(prepare(tmp_path / "whole", tokenizer, inputs, *options).folder)
    assert sum(name.endswith(".mask") for name in whole) > 1
    (tmp_path / "killed").mkdir()
    given = ["prepare", str(inputs), "--tokenizer", str(tokenizer), *options]
    code = [sys.executable, "-c", CODE, str(tmp_path / "killed"), *given]
    done = subprocess.run(code, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    outputs = sorted((tmp_path / "killed").iterdir())
    assert len(outputs) > 30  # the tokenizer's files, the journal, three files a shard, the manifest
    for output in outputs:
        assert tree(output) == whole, output.name
