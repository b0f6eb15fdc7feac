"""Data that is neither text nor tokens, or says otherwise than it is, is refused by name; what is odd is remarked upon."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from corpora import corpus, refused

from helixpipe.data.formats import refusal

TEXT = b"It was a bright cold day in April, and the clocks were striking thirteen.\n" * 20
LINES = b"".join(json.dumps({"text": f"line {i}", "n": i}).encode() + b"\n" for i in range(50))
PREPARE = "make tokens of it: helixpipe prepare"
EXTRACT = "write its text to text files, or its tokens to .npy or .bin"
MEDIA = "give text or tokens"


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return made.getvalue()


def _tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return made.getvalue()


def _npy() -> bytes:
    made = io.BytesIO()
    np.save(made, np.arange(200, dtype=np.uint16))
    return made.getvalue()


def _npz() -> bytes:
    made = io.BytesIO()
    np.savez(made, a=np.arange(200, dtype=np.uint16))
    return made.getvalue()


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        (".gz", "gzip-compressed"),
        (".txt.GZ", "gzip-compressed"),
        (".tgz", "gzip-compressed"),
        (".zst", "zstd-compressed"),
        (".bz2", "bzip2-compressed"),
        (".xz", "xz-compressed"),
        (".lz4", "lz4-compressed"),
        (".br", "compressed"),
        (".zip", "a zip archive"),
        (".tar", "a tar archive"),
        (".7z", "a 7z archive"),
        (".rar", "a rar archive"),
        (".deb", "an ar archive"),
        (".jsonl", "JSON lines"),
        (".ndjson", "JSON lines"),
        (".json-lines", "JSON lines"),
        (".parquet", "a Parquet table"),
        (".arrow", "an Arrow table"),
        (".orc", "an ORC table"),
        (".avro", "an Avro table"),
        (".h5", "an HDF5 file"),
        (".sqlite", "an SQLite database"),
        (".tfrecord", "a TFRecord file"),
        (".pkl", "a pickle"),
        (".npz", "an archive of NumPy arrays"),
        (".safetensors", "model weights"),
        (".pdf", "a PDF"),
        (".png", "a PNG image"),
        (".jpg", "a JPEG image"),
        (".idx", "an index of tokens"),
    ],
)
def test_a_name_is_enough_to_refuse_a_file(tmp_path: Path, suffix: str, what: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(TEXT)
    said = refused(file)
    assert said.startswith(f"data.path: '{file}' is {what}, neither text nor tokens; ")
    todo = said.rpartition("; ")[2]
    if what.endswith("compressed") or what in (
        "a zip archive",
        "a tar archive",
        "a 7z archive",
        "a rar archive",
        "an ar archive",
    ):
        assert todo == "unpack it"
    else:
        assert todo == {
            ".npz": "save one array with numpy.save", ".idx": "give the .bin beside it", ".safetensors": MEDIA,
            ".png": MEDIA, ".jpg": MEDIA, ".jsonl": PREPARE, ".ndjson": PREPARE, ".json-lines": PREPARE, ".parquet": PREPARE,
            ".arrow": PREPARE,
        }.get(suffix, EXTRACT)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(TEXT), "gzip-compressed"),
        (b"\x28\xb5\x2f\xfd\x24\x0a" + TEXT, "zstd-compressed"),
        (bz2.compress(TEXT), "bzip2-compressed"),
        (bz2.compress(b""), "bzip2-compressed"),
        (lzma.compress(TEXT), "xz-compressed"),
        (b"\x04\x22\x4d\x18\x64\x40" + TEXT, "lz4-compressed"),
        (_zip(), "a zip archive"),
        (_npz(), "a zip archive"),
        (_tar(), "a tar archive"),
        (b"7z\xbc\xaf\x27\x1c" + TEXT, "a 7z archive"),
        (b"Rar!\x1a\x07\x01" + TEXT, "a rar archive"),
        (b"!<arch>\n" + TEXT, "an ar archive"),
        (b"PAR1\x15\x04" + TEXT + b"PAR1", "a Parquet table"),
        (b"ARROW1\0\0" + TEXT, "an Arrow table"),
        (b"Obj\x01" + TEXT, "an Avro table"),
        (b"\x89HDF\r\n\x1a\n" + TEXT, "an HDF5 file"),
        (b"SQLite format 3\0" + TEXT, "an SQLite database"),
        (b"\x80\x04\x95\xff\x01\0\0\0\0\0\0" + TEXT, "a pickle"),
        (b"%PDF-1.7\n" + TEXT, "a PDF"),
        (b"\x89PNG\r\n\x1a\n" + TEXT, "a PNG image"),
        (b"\xff\xd8\xff\xe0" + TEXT, "a JPEG image"),
        (b"\x7fELF\x02\x01" + TEXT, "an ELF binary"),
        (b"MMIDIDX\0\0" + TEXT, "an index of tokens"),
        (_npy(), "a NumPy array"),
    ],
)
def test_another_name_does_not_hide_a_format(tmp_path: Path, content: bytes, what: str) -> None:
    for name in ("a.txt", "a.py", "a", "a.bin"):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(
            f"data.path: '{tmp_path / name}' is {what}, neither text nor tokens; "
        )
    assert refused(tmp_path / "a.bin") == refusal(tmp_path / "a.bin")
    if what == "a NumPy array":
        assert refusal(tmp_path / "a.txt").endswith("; name it .npy")
        (tmp_path / "a.npy").write_bytes(content)
        assert refusal(tmp_path / "a.npy") == ""


def test_bytes_that_only_resemble_a_format_are_text(tmp_path: Path) -> None:
    for first in (
        b"BZh9 is a mark",
        b"PAR1 is a gene",
        b"Rar!",
        b"ORC",
        b"GIF89a",
        b"{\n",
        b"[1, 2]\n",
        "\ufeffx".encode(),
        b"\xe9t\xe9 ",
    ):
        (tmp_path / "a.txt").write_bytes(first + TEXT)
        assert corpus(tmp_path / "a.txt").training.read(0, len(first)).tolist() == list(first)


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json"])
def test_json_lines_are_known_by_what_they_are(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    for content in (LINES, b"\xef\xbb\xbf" + LINES, LINES.replace(b"line 0", b"long " * 10_000)):
        file.write_bytes(content)
        assert refused(file) == f"data.path: '{file}' is JSON lines, neither text nor tokens; {PREPARE}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({"a": list(range(200)), "b": {"c": 1}}).encode()),
        ("a.json", json.dumps([{"a": 1}] * 100, indent=1).encode()),
        ("a.json", b"{}\n" + TEXT),
        ("a.json", b'{"a":' * 100_000 + b"\n{}"),
        ("a.txt", b"{braces}\n" + TEXT),
        ("a.log", LINES),
        ("a.py", b"{}\n" * 100),
    ],
)
def test_json_and_source_text_are_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found = corpus(tmp_path / name)
    assert len(found.training) + len(found.held_out) == len(content)


@pytest.mark.parametrize("name", ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32", "UTF-32-LE", "UTF-32-BE"])
def test_text_in_units_of_two_or_four_bytes_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.txt"
    text = TEXT.decode()
    file.write_bytes((text if name[-1].isdigit() else "\ufeff" + text).encode(name))
    assert refused(file) == (
        f"data.path: '{file}' is {name[:6]} text; convert it to UTF-8: iconv -f {name[:6]} -t UTF-8"
    )


def test_a_nul_byte_is_not_text(tmp_path: Path) -> None:
    for name, content, at in (("a.txt", TEXT.decode().encode("utf-16-le"), 1), ("tokens.dat", TEXT + b"\0", len(TEXT))):
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name, dtype="uint32") == (
            f"data.path: '{tmp_path / name}' has a NUL byte at {at}: it is not text, or not in UTF-8; "
            "give UTF-8 text, or tokens named .npy or .bin"
        )


def test_a_file_of_a_folder_is_refused_like_one_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "b.txt").write_bytes(gzip.compress(TEXT))
    first = f"data.path: '{tmp_path}/b.txt' is gzip-compressed, neither text nor tokens; unpack it"
    assert refused(tmp_path) == first
    (tmp_path / "c.png").touch()
    (tmp_path / "d.jsonl").write_bytes(LINES)
    assert refused(tmp_path) == f"{first} (refused in '{tmp_path}' as well: 2 more)"
    (tmp_path / "a.txt").unlink()
    assert refused(tmp_path) == f"{first} (refused in '{tmp_path}' as well: 2 more)"


def test_names_in_capitals_are_the_same_names(tmp_path: Path) -> None:
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "A.BIN")
    (tmp_path / "B.NPY").write_bytes(_npy())
    for name in ("A.BIN", "B.NPY"):
        assert corpus(tmp_path / name).training.read(0, 150).tolist() == list(range(150))


def test_what_a_folder_has_beside_files_is_remarked_upon(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    (other / "b.txt").write_bytes(TEXT)
    (data / "link").symlink_to(other)
    said = f"not read: '{data}/link', no files; links to folders are not followed"
    assert refused(data) == f"data.path: '{data}' is empty; give a file or folder with text or tokens ({said})"
    os.mkfifo(data / "pipe")
    (data / "a.txt").write_bytes(TEXT)
    (data / "linked.txt").symlink_to(other / "b.txt")
    found = corpus(data)
    assert [Path(piece.path).name for piece in found.training.pieces] == ["a.txt", "linked.txt"]
    assert found.remarks == (
        f"data.path: not read: '{data}/pipe' and 1 more, no files; links to folders are not followed",
    )


def test_text_under_a_larger_vocabulary_is_remarked_upon(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert corpus(tmp_path).remarks == ()
    assert corpus(tmp_path, 257).remarks == (
        "data.path: text is read as bytes, which are 256 of the 257 words of model.vocabulary; "
        "set it to 256, or give tokens of its tokenizer as .npy or .bin",
    )


def test_32_bit_tokens_that_are_read_as_16_bit_are_remarked_upon(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    np.arange(200, dtype=np.int32).tofile(file)
    assert corpus(file).remarks == (
        f"data.path: '{file}' has 0 for every second token, as 32-bit tokens read as uint16 do; "
        "set data.dtype to uint32 if it holds these",
    )
    assert corpus(file, dtype="uint32").remarks == ()
    for other in (np.zeros(200, np.uint16), np.arange(200, dtype=np.uint16)):
        other.tofile(file)
        assert corpus(file).remarks == ()


@pytest.mark.parametrize(
    ("array", "holds"),
    [
        (np.zeros(100, np.float32), "float32[100]"),
        (np.zeros(100, np.uint8), "uint8[100]"),
        (np.zeros(100, ">u2"), ">u2[100]"),
        (np.array(5, np.uint16), "uint16[]"),
        (np.zeros((4, 25), np.uint32), "uint32[4, 25]"),
        (np.array(["a"] * 20), "<U1[20]"),
    ],
)
def test_arrays_of_anything_but_tokens_are_refused(tmp_path: Path, array: np.ndarray, holds: str) -> None:
    np.save(tmp_path / "a.npy", array)
    assert refused(tmp_path / "a.npy") == (
        f"data.path: '{tmp_path}/a.npy' holds {holds}; give one dimension of uint16, uint32, int32 or int64"
    )


def _damaged(find: bytes, put: bytes) -> bytes:
    assert len(find) == len(put)
    assert find in _npy()
    return _npy().replace(find, put)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        _damaged(b"}", b" "),
        _damaged(b"(200,)", b"(007,)"),
        _damaged(b"'descr'", b"b'escr'"),
        _damaged(b"(200,), } " + b" " * 20, b"(" + b"9" * 25 + b",)}" + b" "),
    ],
)  # fmt: skip
def test_a_damaged_array_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Guards against what numpy makes of a damaged header: TokenError, SyntaxError, OverflowError, TypeError."""
    (tmp_path / "a.npy").write_bytes(content)
    assert refused(tmp_path / "a.npy") == (
        f"data.path: '{tmp_path}/a.npy' is not a whole .npy array of numbers; write it with numpy.save"
    )


def test_an_array_of_objects_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, "a"], object), allow_pickle=True)
    assert refused(tmp_path / "a.npy").endswith("is not a whole .npy array of numbers; write it with numpy.save")
