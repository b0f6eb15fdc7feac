"""Odd inputs are read rightly, or one line says what, where and what to do; none is waited for."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from making import documents, own, prepare, refused, write_lines, write_tokenizer

from helixpipe.cli import main
from helixpipe.data import records
from helixpipe.data.inputs import Input
from helixpipe.data.options import Options

SKIP = " (--on-error skip leaves such out)"


def test_a_name_that_stands_twice_is_refused_where_it_is_read(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Readers of JSON differ in which of the two they take."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one", "id": 1, "id": 2, "more": {"a": 1, "a": 2}}\n{"text": "a", "te\\u0078t": "b"}\n')
    said = f"{file}:2: has the field 'text' more than once; leave one of them"
    assert refused(capsys, tmp_path / "out", tokenizer, file) == said + SKIP
    assert documents(prepare(tmp_path / "out", tokenizer, file, "--on-error", "skip")) == own(tokenizer, ["one"])


def test_a_mark_at_the_head_of_json_lines_is_no_letter(tmp_path: Path, tokenizer: Path) -> None:
    line = json.dumps({"text": "marked"}).encode() + b"\r\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line * 2)
    assert documents(prepare(tmp_path / "out", tokenizer, tmp_path / "a.jsonl")) == own(tokenizer, ["marked"] * 2)


def test_records_of_several_kinds(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field may have other neighbours in every line; a column of another kind in one of many files is refused at once."""
    rows = [{"text": "a", "n": 1}, {"n": "x", "text": "b", "deep": [{"k": None}]}, {"text": "c"}, {"body": "d"}]
    mixed = write_lines(tmp_path / "a.jsonl", rows)
    assert refused(capsys, tmp_path / "out", tokenizer, mixed) == (
        f"{mixed}:4: has no field 'text'; its fields: 'body'; name it (see --text)" + SKIP
    )
    assert documents(prepare(tmp_path / "out", tokenizer, mixed, "--on-error", "skip")) == own(tokenizer, list("abc"))
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, column in (("a", {"text": ["x"]}), ("b", {"text": [1]})):
        pyarrow.parquet.write_table(pyarrow.table(column), folder / f"{name}.parquet")
    assert refused(capsys, tmp_path / "tables-out", tokenizer, folder) == (
        f"'{folder}/b.parquet': column 'text' is int64, not text; name another column"
    )
    assert not (tmp_path / "tables-out").exists()


@pytest.mark.parametrize("field", ["text", "p", "c"])
def test_half_of_a_surrogate_pair_is_refused_in_any_field(
    tmp_path: Path, tokenizer: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    options = [] if field == "text" else ["--prompt", "p", "--completion", "c"]
    for half in ("d800", "dfff"):
        whole = json.dumps({"text": "x", "p": "x", "c": "x"} | {field: "y"})
        file.write_text(whole.replace('"y"', f'"\\u{half}"') + "\n")
        assert refused(capsys, tmp_path / half, tokenizer, file, *options) == (
            f"{file}:1: field '{field}' has a lone surrogate (\\u{half}) at 1" + SKIP
        )
    file.write_text(json.dumps({"text": "\U0001f600", "p": "\U0001f600", "c": ""}) + "\n")  # both halves are a letter
    assert len(prepare(tmp_path / "out", tokenizer, file, *options)) == 1


def test_links_to_nowhere(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "gone.jsonl").symlink_to("nowhere")
    assert refused(capsys, tmp_path / "out", tokenizer, folder / "gone.jsonl") == (
        f"'{folder}/gone.jsonl' is a link to nowhere; mend it, or give the file itself"
    )
    write_lines(folder / "a.jsonl", [{"text": "x"}])
    found = prepare(tmp_path / "out", tokenizer, folder)
    assert found.manifest["skipped"]["no_files"] == [f"{folder}/gone.jsonl"]
    assert f"not read: '{folder}/gone.jsonl' is no file, or a link to a folder\n" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_a_pipe_is_never_waited_for(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    for name in ("state.json", "dataset_dict.json", "manifest.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        os.mkfifo(folder / name)
        write_lines(folder / "a.jsonl", [{"text": "x"}])
        if name == "manifest.json":
            assert len(prepare(tmp_path / "out", tokenizer, folder)) == 1
        else:
            assert refused(capsys, tmp_path / "out", tokenizer, folder) == (
                f"'{folder}/{name}' cannot be read as JSON; save it anew"
            )
    os.mkfifo(tmp_path / "pipe")
    assert refused(capsys, tmp_path / "new", tmp_path / "pipe", file) == (
        f"--tokenizer: '{tmp_path}/pipe' is neither a file nor a folder; give a folder with tokenizer.json, or that file"
    )
    for name in ("tokenizer.json", "merges.txt"):
        folder = tmp_path / f"tokenizer-{name}"
        folder.mkdir()
        os.mkfifo(folder / name)
        assert refused(capsys, tmp_path / "new", folder, file) == (
            f"--tokenizer: '{folder}/{name}' is no file, or a link to nowhere; get it anew"
        )
    output = tmp_path / "written"
    output.mkdir()
    os.mkfifo(output / "manifest.json")
    given = ["prepare", str(file), "--tokenizer", str(tokenizer), "--output", str(output)]
    assert main(given) == 2
    assert capsys.readouterr().err == (
        f"helixpipe: error: --output: '{output}' has a manifest.json of something else; give a new folder\n"
    )


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that everybody may look into, where the rights of somebody else than root hold."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_what_may_not_be_read_or_written_is_named(
    locked: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, closed = locked / "in", locked / "in/a.jsonl", locked / "in/closed"
    folder.mkdir()
    write_lines(file, [{"text": "x"}])
    closed.mkdir()
    made = write_tokenizer(locked / "tokenizer")
    root, somebody = os.geteuid() == 0, 65534
    if root:
        for path in (locked, *locked.rglob("*")):
            os.chmod(path, 0o755)
        os.seteuid(somebody)
    try:
        outside = locked / "out"
        if root:  # the folder is not somebody's
            assert refused(capsys, outside, made, file) == (
                f"--output: '{outside}' cannot be written: permission denied; give a folder that you may write to"
            )
    finally:
        if root:
            os.seteuid(0)
    os.chmod(closed, 0)
    os.chmod(made / "tokenizer_config.json", 0)
    if root:
        os.seteuid(somebody)
    try:
        assert refused(capsys, locked / "out", made, file) == (
            f"--tokenizer: '{made}/tokenizer_config.json' cannot be read: Permission denied"
        )
        plain = made / "tokenizer.json"
        assert refused(capsys, locked / "out", plain, folder, "--end-token", "none") == (
            f"'{closed}' cannot be read: Permission denied"
        )
        assert refused(capsys, locked / "out", plain, closed / "a.jsonl", "--end-token", "none") == (
            f"'{closed}/a.jsonl' cannot be read: permission denied"
        )
    finally:
        if root:
            os.seteuid(0)
        os.chmod(closed, 0o755)
    os.chmod(file, 0)
    if root:
        os.seteuid(somebody)
    try:
        assert refused(capsys, locked / "out", made / "tokenizer.json", file, "--end-token", "none") == (
            f"'{file}' cannot be read: Permission denied"
        )
    finally:
        if root:
            os.seteuid(0)


def test_units_end_together_and_are_not_too_many() -> None:
    def count(size_bytes: int) -> int:
        return len(records.units([Input("a", "lines", "", size_bytes, 0)], Options()))

    assert count(2**10) == 1
    assert count(2**26) == 64  # so that the last ones of two processes end at about the same time
    assert count(10 * 2**30) == 2560
    assert count(2**40) == records.MOST_UNITS
