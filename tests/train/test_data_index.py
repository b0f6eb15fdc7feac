"""Megatron's `.idx` decides what the `.bin` beside it holds, and one that does not belong to it is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from corpora import corpus, refused

CODES = {
    "uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8,
}  # fmt: skip
MEND = "write the index of its .bin anew, or take it away and set data.dtype"


def index(
    lengths: Sequence[int], dtype: str = "int32", magic: bytes = b"MMIDIDX\0\0", version: int = 1, code: int | None = None,
    modes: bool = False,
) -> bytes:  # fmt: skip
    """An index as Megatron writes it, every sequence a document."""
    width, marks = np.dtype(dtype).itemsize, range(len(lengths) + 1)
    offsets = [width * sum(lengths[:i]) for i in range(len(lengths))]
    head = magic + struct.pack("<QBQQ", version, CODES[dtype] if code is None else code, len(lengths), len(marks))
    arrays = np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes() + np.array(marks, "<i8").tobytes()
    return head + arrays + (bytes(len(lengths)) if modes else b"")


def write(folder: Path, indexed: bytes, dtype: str = "int32", tokens: int = 200, name: str = "a") -> Path:
    (np.arange(tokens) % 127).astype(dtype).tofile(folder / f"{name}.bin")
    (folder / f"{name}.idx").write_bytes(indexed)
    return folder / f"{name}.bin"


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
@pytest.mark.parametrize("modes", [False, True])
def test_the_index_decides_the_dtype(tmp_path: Path, dtype: str, modes: bool) -> None:
    """Guards against int32 read as uint16, which made every second token 0."""
    file = write(tmp_path, index([50, 0, 120, 30], dtype, modes=modes), dtype)
    for path in (file, tmp_path, tmp_path / "a"):
        found = corpus(path, 128)
        assert found.training.read(0, 150).tolist() == [i % 127 for i in range(150)]
        assert found.held_out.read(0, 50).tolist() == [i % 127 for i in range(150, 200)]
        assert found.remarks == ()


def test_files_of_a_folder_have_an_index_each(tmp_path: Path) -> None:
    write(tmp_path, index([200], "int32"), "int32", name="a.text_document")
    write(tmp_path, index([200], "uint16"), "uint16", name="b.text_document")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "c.bin")
    found = corpus(tmp_path)
    assert [piece.dtype for piece in (*found.training.pieces, *found.held_out.pieces)] == [
        "int32", "uint16", "uint16", "uint16",
    ]  # fmt: skip
    assert len(found.training) + len(found.held_out) == 500


def test_an_index_in_capitals_counts_too(tmp_path: Path) -> None:
    (tmp_path / "A.IDX").write_bytes(index([200]))
    np.arange(200, dtype=np.int32).tofile(tmp_path / "A.BIN")
    assert corpus(tmp_path).training.read(0, 150).tolist() == list(range(150))


def test_tokens_with_an_index_may_begin_like_any_format(tmp_path: Path) -> None:
    file = write(tmp_path, index([200], "uint16"), "uint16")
    file.write_bytes(b"PK\x03\x04" + file.read_bytes()[4:])
    assert corpus(file, 2**16).training.read(0, 1).tolist() == [0x4B50]


def test_a_dtype_that_contradicts_the_index_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, index([200]))
    assert refused(file, dtype="uint16") == (
        f"data.dtype: uint16, and '{tmp_path}/a.idx' says int32; leave data.dtype out"
    )
    assert corpus(file, dtype="uint32").training.read(0, 150).tolist() == corpus(file).training.read(0, 150).tolist()
    file = write(tmp_path, index([200], "uint16"), "uint16")
    assert refused(file, dtype="uint32") == (
        f"data.dtype: uint32, and '{tmp_path}/a.idx' says uint16; leave data.dtype out"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_index_of_floats_is_refused(tmp_path: Path, dtype: str) -> None:
    assert refused(write(tmp_path, index([200], dtype), dtype)) == (
        f"data.path: '{tmp_path}/a.idx' says {dtype}, which are no tokens; give token ids"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not a Megatron index (MMIDIDX)"),
        (index([200], magic=b"TNTIDX\0\0\0"), "is not a Megatron index (MMIDIDX)"),
        (index([200])[:20], "is cut short: 20 bytes"),
        (index([200])[:-1], "has 61 bytes, and its 1 sequences and 2 document marks take 62"),
        (index([200]) + b"more", "has 66 bytes, and its 1 sequences and 2 document marks take 62"),
        (index([200], version=2), "is a Megatron index of version 2, and only 1 is known"),
        (index([200], code=0), "has dtype code 0, and only 1 to 8 are known"),
        (index([200], code=9), "has dtype code 9, and only 1 to 8 are known"),
        (index([300, -100]), "has a sequence of negative length"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    assert refused(write(tmp_path, content)) == f"data.path: '{tmp_path}/a.idx' {why}; {MEND}"


@pytest.mark.parametrize("lengths", [[199], [100, 101], [], [2**31 - 1] * 3])
def test_an_index_of_other_tokens_is_refused(tmp_path: Path, lengths: list[int]) -> None:
    assert refused(write(tmp_path, index(lengths))) == (
        f"data.path: '{tmp_path}/a.bin' has 800 bytes, and its index counts {sum(lengths)} tokens of int32, "
        f"{4 * sum(lengths)} bytes; one of the two is cut short or another's"
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_only_has_the_name_of_an_index_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Guards against the wait for a pipe, and against tokens read without the index that a link was to lead to."""
    np.arange(200, dtype=np.int32).tofile(tmp_path / "a.bin")
    make(tmp_path / "a.idx")
    for path in (tmp_path / "a.bin", tmp_path):
        assert refused(path) == f"data.path: '{tmp_path}/a.idx' is a link to nowhere or not a file; {MEND}"


def test_an_index_without_its_tokens_is_refused(tmp_path: Path) -> None:
    write(tmp_path, index([200]))
    said = f"data.path: '{tmp_path}/a.idx' is an index of tokens, neither text nor tokens; give the .bin beside it"
    assert refused(tmp_path / "a.idx") == said
    (tmp_path / "a.bin").unlink()
    assert refused(tmp_path) == said


def test_a_negative_token_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, index([200]))
    tokens = np.arange(200, dtype=np.int32)
    tokens[7] = -1
    tokens.tofile(file)
    assert refused(file) == (
        f"data.path: '{file}' has token -1 at 7, beyond a vocabulary of 256; "
        "raise model.vocabulary or prepare the data with its tokenizer"
    )


def test_bytes_that_are_tokens_may_have_a_small_vocabulary(tmp_path: Path) -> None:
    file = write(tmp_path, index([200], "uint8"), "uint8")
    assert len(corpus(file, 127).training) == 150
    assert refused(file, 100).startswith(f"data.path: '{file}' has token 126 at 126, beyond a vocabulary of 100; ")


def test_an_index_states_that_16_bits_are_meant(tmp_path: Path) -> None:
    """A dtype that is only assumed is refused for so many words (see test_data)."""
    assert corpus(write(tmp_path, index([200], "uint16"), "uint16"), 2**16 + 1)
