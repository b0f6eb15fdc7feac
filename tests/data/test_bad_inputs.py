"""What cannot be read is one line that says what, where and what to do; or it is left out, counted and named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from making import byte_level, documents, own, prepare, refused, write_lines, write_tokenizer
from tokenizers import models, pre_tokenizers, processors

from helixpipe.cli import main
from helixpipe.data import extras, inputs, lines, records, shards

GOOD = b'{"text": "good"}\n'
SKIP = " (--on-error skip leaves such out)"


BAD_LINES = {
    b"not json": "is not JSON: Expecting value at character 1",
    b'{"text": "cut': "is not JSON: Unterminated string starting at at character 10",
    b'{"other": 1, "id": 2}': "has no field 'text'; its fields: 'other', 'id'; name it (see --text)",
    b"{}": "has no field 'text'; its fields: none; name it (see --text)",
    b'{"text": 7}': "field 'text' is a number (7), not text",
    b'{"text": 1.5}': "field 'text' is a number (1.5), not text",
    b'{"text": true}': "field 'text' is true, not text",
    b'{"text": null}': "field 'text' is null, not text",
    b'{"text": ["a"]}': "field 'text' is a list, not text",
    b'{"text": {"a": 1}}': "field 'text' is an object, not text",
    b'["text"]': "is a list, not an object with fields",
    b'"text"': "is text, not an object with fields",
    b'{"text": "a \\ud83d b"}': r"field 'text' has a lone surrogate (\ud83d) at 3",
    b'{"text": "caf\xe9"}': "is not UTF-8 (byte 14 is 0xE9); convert the file: iconv -f LATIN1 -t UTF-8",
    b'{"text": "a\0b"}': "is not JSON: Invalid control character at at character 12",
    b'{"text": ' + b"9" * 5000 + b"}": "is not JSON that can be read: a number too long, or too deeply nested",
    b"[" * 200_000: "is not JSON that can be read: a number too long, or too deeply nested",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:24]))
def test_a_bad_line_stops_or_is_left_out(
    tmp_path: Path, tokenizer: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    said = f"{file}:3: {BAD_LINES[line]}"
    assert refused(capsys, tmp_path / "out", tokenizer, file) == said + SKIP
    found = prepare(tmp_path / "out", tokenizer, file, "--on-error", "skip")
    assert f"skipped {said}\n" in capsys.readouterr().err
    assert documents(found) == own(tokenizer, ["good"] * 2)
    assert (found.manifest["skipped"]["bad"], found.manifest["skipped"]["first_bad"]) == (1, [said])


def test_lines_are_named_by_their_number_in_the_file_wherever_it_is_cut(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(b"{bad}\n" if i % 2 == 1 else GOOD for i in range(60)))
    wanted = [f"{file}:{i + 1}: " for i in range(60) if i % 2 == 1]
    for size in (9, 30, 10_000):
        monkeypatch.setattr(records, "UNIT_BYTES", size)
        skipped = prepare(tmp_path / f"out{size}", tokenizer, file, "--on-error", "skip").manifest["skipped"]
        assert skipped["bad"] == len(wanted)
        assert [told.split("is not")[0] for told in skipped["first_bad"]] == wanted[: shards.MOST_NAMED]


def test_a_line_without_end_is_never_held(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (inputs, lines, records):
        monkeypatch.setattr(module, "MOST_DOCUMENT_BYTES", 1000)
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b'{"text": "' + b"x" * 30_000 + b'"}\n' + GOOD)
    said = f"{file}:2: is longer than the 1,000 bytes that a document may have; divide it"
    assert refused(capsys, tmp_path / "out", tokenizer, file) == said + SKIP
    for size in (100, 10**6):
        monkeypatch.setattr(records, "UNIT_BYTES", size)
        found = prepare(tmp_path / f"out{size}", tokenizer, file, "--on-error", "skip")
        assert documents(found) == own(tokenizer, ["good"] * 2)
    (tmp_path / "b.txt").write_bytes(b"y" * 1001)
    assert refused(capsys, tmp_path / "text", tokenizer, tmp_path / "b.txt") == (
        f"'{tmp_path}/b.txt' is one document of 1,001 bytes, more than the 1,000 that one may have; "
        "give --split-lines if its lines are documents, or write its documents as .jsonl"
    )


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_packed_file_that_is_cut_short_is_named(
    tmp_path: Path, tokenizer: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(1000))
    packed = gzip.compress(content) if packing == "gz" else zstandard.ZstdCompressor().compress(content)
    file = tmp_path / f"a.jsonl.{packing}"
    file.write_bytes(packed[: len(packed) // 2])
    told = refused(capsys, tmp_path / "out", tokenizer, file)
    assert told.startswith(f"{file}:")
    assert told.endswith("the file is cut short here; get it anew" + SKIP)
    found = prepare(tmp_path / "out", tokenizer, file, "--on-error", "skip")
    assert documents(found) == own(tokenizer, [json.loads(each)["text"] for each in content.splitlines()[: len(found)]])
    assert found.manifest["skipped"]["first_bad"] == [
        f"{file}:{len(found) + 1}: the file is cut short here; get it anew"
    ]
    file.write_bytes(b"no such thing, whatever its name says")
    assert refused(capsys, tmp_path / "damaged", tokenizer, file) == (
        f"{file}:1: the file is damaged here; get it anew" + SKIP
    )


def write_table(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_tables_are_looked_at_before_anything_is_done(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nested = write_table(tmp_path / "a.parquet", text=[["a", "b"]], meta=[{"n": 1}], n=[3], raw=[b"x"])
    for asked, kind in (
        ("text", "list<element: string>"),
        ("meta", "struct<n: int64>"),
        ("n", "int64"),
        ("raw", "binary"),
    ):
        assert refused(capsys, tmp_path / "out", tokenizer, nested, "--text", asked) == (
            f"'{nested}': column '{asked}' is {kind}, not text; name another column"
        )
    assert refused(capsys, tmp_path / "out", tokenizer, nested, "--text", "body") == (
        f"'{nested}' has no column 'body'; it has 'text', 'meta', 'n', 'raw'; name the column (see --text)"
    )
    chats = write_tokenizer(tmp_path / "chats", template="{{ messages }}")
    assert refused(capsys, tmp_path / "out", chats, nested, "--messages", "n") == (
        f"'{nested}': column 'n' is int64, not a list of messages; name another column"
    )
    whole = write_table(tmp_path / "b.parquet", text=["a", None, "b", "c", None])
    assert (
        refused(capsys, tmp_path / "null", tokenizer, whole) == f"{whole}, row 2: field 'text' is null, not text" + SKIP
    )
    found = prepare(tmp_path / "null", tokenizer, whole, "--on-error", "skip")
    assert found.manifest["skipped"]["first_bad"] == [
        f"{whole}, row {i}: field 'text' is null, not text" for i in (2, 5)
    ]
    whole.write_bytes(whole.read_bytes()[:-20])
    assert refused(capsys, tmp_path / "cut", tokenizer, whole).startswith(f"'{whole}' cannot be read as Parquet: ")
    (tmp_path / "c.arrow").write_bytes(b"nothing of the kind")
    assert refused(capsys, tmp_path / "cut", tokenizer, tmp_path / "c.arrow").startswith(
        f"'{tmp_path}/c.arrow' cannot be read as Arrow: "
    )


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text; convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "text".encode("utf-32"), "is UTF-32 text; convert it to UTF-8: iconv -f UTF-32 -t UTF-8"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16 text; convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", GOOD.decode().encode("utf-16-le"), "has a NUL byte at 1: it is not text, or not in UTF-8; "
         "give UTF-8 text, or tokens named .npy or .bin"),
        ("a.jsonl", gzip.compress(GOOD, mtime=0), "is gzip-compressed; name it by what it is, as in .jsonl.gz"),
        ("a.gz", gzip.compress(GOOD, mtime=0), "is gzip-compressed; name it .jsonl.gz if it holds JSON lines, or unpack it"),
        ("a.txt", gzip.compress(GOOD, mtime=0), "is gzip-compressed; unpack it"),
        ("a.txt", GOOD * 2, "is JSON lines; name it .jsonl"),
        ("a.json", b' [ {"text": "a"}]', "is a list of JSON records; write one a line (jq -c '.[]') and name it .jsonl"),
        ("a.pdf", b"%PDF-1.7", "is a PDF; write its text to text files, or its tokens to .npy or .bin"),
        ("a.bin", b"\0\0", "has tokens and not text; train on it as data.path"),
        ("a.npy", b"\0\0", "has tokens and not text; train on it as data.path"),
    ],
)  # fmt: skip
def test_files_that_are_something_else(
    tmp_path: Path, tokenizer: Path, name: str, content: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(capsys, tmp_path / "out", tokenizer, tmp_path / name) == f"'{tmp_path / name}' {why}"
    assert not (tmp_path / "out").exists()


def test_text_in_latin_1_is_a_bad_document(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes("un café".encode("latin-1"))
    said = f"{tmp_path}/a.txt: is not UTF-8 (byte 7 is 0xE9); convert the file: iconv -f LATIN1 -t UTF-8"
    assert refused(capsys, tmp_path / "out", tokenizer, tmp_path / "a.txt") == said + SKIP
    told = refused(capsys, tmp_path / "out", tokenizer, tmp_path / "a.txt", "--on-error", "skip")
    assert told == "no document is left to prepare (1 bad); see --min-tokens, --max-tokens and the fields"


def test_paths_without_files(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty, pipe = tmp_path / "out", tmp_path / "empty", tmp_path / "pipe"
    empty.mkdir()
    os.mkfifo(pipe)
    give = "give text, .jsonl, .parquet or a dataset"
    assert refused(capsys, out, tokenizer, empty) == f"'{empty}' has no files to prepare; {give}"
    assert refused(capsys, out, tokenizer, pipe) == (
        f"'{pipe}' is neither a file nor a folder; write what it gives to a file"
    )
    assert refused(capsys, out, tokenizer, empty / "no") == (
        f"'{empty}/no' does not exist; give text, .jsonl, .parquet, a dataset, or a folder of them"
    )
    assert refused(capsys, out, tokenizer, "x" * 300) == f"'{'x' * 300}' cannot be read: file name too long"
    os.mkfifo(empty / "inside")
    assert refused(capsys, out, tokenizer, empty) == (
        f"'{empty}' has no files to prepare ('{empty}/inside' is no file); {give}"
    )
    (empty / "a.txt").write_text("some text")
    (empty / "link").symlink_to(tmp_path)
    assert prepare(out, tokenizer, empty).manifest["skipped"]["no_files"] == [f"{empty}/link", f"{empty}/inside"]
    assert f"not read: '{empty}/inside' is no file, or a link to a folder\n" in capsys.readouterr().err
    assert refused(capsys, tmp_path / "again", tokenizer, out) == (
        f"'{out}' is prepared already; train on it as data.path"
    )


def test_datasets_that_are_not_whole(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "dataset", tmp_path / "out"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    assert refused(capsys, out, tokenizer, folder) == (
        f"'{folder}/data.arrow' is missing, and state.json beside it lists it; save the dataset anew"
    )
    (folder / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i"}]}))
    assert refused(capsys, out, tokenizer, folder) == (
        f"'{folder}' is a dataset with its rows selected by indices; save it flattened (flatten_indices)"
    )
    (folder / "state.json").write_text("{")
    assert refused(capsys, out, tokenizer, folder) == f"'{folder}/state.json' cannot be read as JSON; save it anew"
    (folder / "state.json").unlink()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert refused(capsys, out, tokenizer, folder) == (
        f"'{folder}' is a dataset of splits train, test; give one of them, such as '{folder}/train'"
    )


def test_tokenizers_that_cannot_be_used(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_lines(tmp_path / "a.jsonl", [{"text": "x", "m": [{"role": "user"}]}]), tmp_path / "out"
    assert refused(capsys, out, tmp_path / "no", file) == (
        f"--tokenizer: '{tmp_path}/no' does not exist; give a folder with tokenizer.json, or that file"
    )
    (tmp_path / "bad.json").write_text('{"model": 3}')
    assert refused(capsys, out, tmp_path / "bad.json", file).startswith(
        f"--tokenizer: '{tmp_path}/bad.json' is not a tokenizer.json: "
    )
    (tmp_path / "nothing").mkdir()
    assert refused(capsys, out, tmp_path / "nothing", file).startswith(
        f"--tokenizer: '{tmp_path}/nothing' has no tokenizer.json, and transformers cannot read it: "
    )
    bare = tokenizer / "tokenizer.json"
    assert refused(capsys, out, bare, file) == (
        f"--end-token: '{bare}' does not say which token ends a document; "
        "give one (its special ones: '<|end|>', '<|im_start|>', '<|im_end|>'), or none"
    )
    assert refused(capsys, out, bare, file, "--end-token", "</s>") == (
        "--end-token: '</s>' is not a token of the tokenizer; give one, its id, or none"
    )
    assert refused(capsys, out, bare, file, "--messages", "m") == (
        f"--messages: the tokenizer '{bare}' has no chat template; give a folder with one"
    )
    made = write_tokenizer(tmp_path / "made")
    (made / "tokenizer_config.json").write_text("{")
    assert (
        refused(capsys, out, made, file) == f"--tokenizer: tokenizer_config.json of '{made}' is not JSON; get it anew"
    )
    assert not out.exists()


def test_a_token_beyond_the_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="[X] $A", special_tokens=[("[X]", 70_000)])
    folder = write_tokenizer(tmp_path / "tokenizer", made)
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    last = made.get_vocab_size() - 1
    assert refused(capsys, tmp_path / "out", folder, file, "--on-error", "skip") == (
        f"--tokenizer: it gives token 70000, and its vocabulary ends at {last}; "
        "its post-processor or an added token is not of this vocabulary"
    )


def test_a_text_that_the_tokenizer_cannot_take_is_a_bad_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"known": 0, "<|end|>": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = write_tokenizer(tmp_path / "tokenizer", made)
    file = write_lines(tmp_path / "a.jsonl", [{"text": "known"}, {"text": "other"}, {"text": "known known"}])
    assert refused(capsys, tmp_path / "out", folder, file).startswith(f"{file}:2: the tokenizer fails: ")
    assert documents(prepare(tmp_path / "out", folder, file, "--on-error", "skip")) == [[0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "0"], "--workers: 0; give 1 to 512"),
        (["--min-tokens", "-1"], "--min-tokens: -1; give 0 or more"),
        (["--min-tokens", "9", "--max-tokens", "8"], "--max-tokens: 8; give at least 1, and no less than --min-tokens"),
        (["--prompt", "p"], "--completion: missing; the two go together"),
        (["--completion", "p"], "--prompt: missing; the two go together"),
        (["--text", "t", "--messages", "m"], "--messages: does not go with --text; give one of them"),
        (["--text", ""], "--text: no field; name one"),
        (["--on-error", "pass"], "--on-error: invalid choice: 'pass' (choose from 'stop', 'skip')"),
        (["--txt", "a"], "'--txt' is not an option of helixpipe prepare; did you mean '--text'?"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, tokenizer: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prepare", "a.jsonl", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), *options]
    assert main(given) == 2
    assert capsys.readouterr().err == f"helixpipe: error: {said}\n"


def test_plain_text_has_no_fields(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    given = ("--prompt", "p", "--completion", "c")
    assert refused(capsys, tmp_path / "out", tokenizer, tmp_path / "a.txt", *given) == (
        f"'{tmp_path}/a.txt' is plain text, which has no fields; give .jsonl or .parquet, or leave --prompt out"
    )


@pytest.mark.parametrize("missing", ["tokenizers", "pyarrow", "zstandard"])
def test_a_missing_library_is_named(
    tmp_path: Path, tokenizer: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = extras.import_module

    def without(name: str) -> Any:
        if name.startswith(missing):
            raise ImportError(name)
        return found(name)

    monkeypatch.setattr(extras, "import_module", without)
    file = tmp_path / {"tokenizers": "a.jsonl", "pyarrow": "a.parquet", "zstandard": "a.jsonl.zst"}[missing]
    file.write_bytes(GOOD)
    what = "prepare" if missing == "tokenizers" else f"'{file}'"
    assert refused(capsys, tmp_path / "out", tokenizer, file) == (
        f"{what} needs {missing}, which is not installed; pip install 'helixpipe[data]'"
    )
