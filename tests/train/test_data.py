"""Data: what is read is what is in the files, batches depend on seed and step alone, and mistakes are one line."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixpipe.config_text import build_config
from helixpipe.errors import DataError
from helixpipe.train import token_files
from helixpipe.train.data import Corpus, open_corpus
from helixpipe.train.pieces import Piece, Tokens


def corpus(path: object, length: int = 8, held_out: float = 0.25, **data: object) -> Corpus:
    table = {
        "data": {"path": str(path), "held_out": held_out, **data},
        "train": {"sequence_length": length, "microbatch_size": 2},
        "schedule": {"microbatches": 3},
    }
    return open_corpus(build_config(table))


def test_the_default_is_the_standard_library() -> None:
    found = open_corpus(build_config({}))
    assert len(found.training) > 1_000_000
    assert all(piece.path.endswith(".py") for piece in found.training.pieces)
    assert 0.09 < len(found.held_out) / (len(found.training) + len(found.held_out)) < 0.11


def test_bytes_are_tokens_and_targets_are_the_next_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(1, 256)) * 4)
    found = corpus(file)
    assert len(found.training) == 765
    assert len(found.held_out) == 255
    batch = found.batch(1)
    assert batch.tokens.shape == batch.targets.shape == (6, 8)
    assert batch.tokens.dtype == batch.targets.dtype == np.int64
    assert (batch.targets == batch.tokens % 255 + 1).all()
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()


def test_batches_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(np.random.default_rng(0).integers(1, 256, 5000, np.uint8).tobytes())
    one, other = corpus(file), corpus(file)
    later = [one.batch(step) for step in range(1, 6)][4]
    assert (later.tokens == other.batch(5).tokens).all()
    assert (later.tokens != one.batch(3).tokens).any()
    first, second = ([batch.tokens.tolist() for batch in one.evaluation(18)] for _ in range(2))
    assert first == second
    assert len(first) == 3


def test_the_held_out_tail_is_never_trained_on(tmp_path: Path) -> None:
    for name, text in (("a", b"a" * 50), ("b", b"b" * 30), ("c", b"c" * 20)):
        (tmp_path / f"{name}.txt").write_bytes(text)
    found = corpus(tmp_path, length=4, held_out=0.3)
    assert bytes(found.training.read(0, len(found.training)).tolist()) == b"a" * 50 + b"b" * 20
    assert bytes(found.held_out.read(0, len(found.held_out)).tolist()) == b"b" * 10 + b"c" * 20
    seen = {token for step in range(1, 51) for token in found.batch(step).targets.ravel().tolist()}
    assert seen == set(b"ab")
    targets = [token for batch in found.evaluation(20) for token in batch.targets.ravel().tolist()]
    assert set(targets) == {*b"bc", -100}, "the last batch is filled up with what counts nothing"


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "z/c.py", ".hidden", ".git/object"):
        (tmp_path / name).write_text(f"<{name}>" + "." * 20)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    found = corpus(tmp_path, length=4, held_out=0.0)
    assert [Path(piece.path).name for piece in found.training.pieces] == ["a.md", "b.txt", "c.py"]
    assert list(found.evaluation(0)) == []
    assert found.remarks == (f"data.path: not read: '{tmp_path}/gone', no files; links to folders are not followed",)


def test_a_file_that_cannot_be_looked_at_is_not_left_out(tmp_path: Path) -> None:
    """Guards against training on less than was given. A path beyond 4096 bytes stands for a folder without permission."""
    folder = tmp_path
    while len(str(folder)) < 3900:
        folder /= "d" * 100
    folder.mkdir(parents=True)
    inside = os.open(folder, os.O_RDONLY)
    os.close(os.open("x" * 200, os.O_CREAT | os.O_WRONLY, dir_fd=inside))
    os.close(inside)
    with pytest.raises(DataError) as caught:
        corpus(tmp_path)
    assert str(caught.value) == f"data.path: '{folder}/{'x' * 200}' cannot be read: File name too long"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_reading_across_files_is_reading_their_concatenation(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    pieces, whole, value = [], [], 0
    for index, size in enumerate([*sizes, 1]):
        array = np.arange(value, value + size, dtype=np.uint16)
        value += size
        array.tofile(folder / f"{index}.bin")
        pieces.append(Piece(str(folder / f"{index}.bin"), "uint16", 0, size))
        whole += array.tolist()
    start = data.draw(st.integers(0, len(whole) - 1))
    count = data.draw(st.integers(1, len(whole) - start))
    assert Tokens(pieces).read(start, count).tolist() == whole[start : start + count]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_of_npy_and_bin_files(tmp_path: Path, dtype: str) -> None:
    tokens = np.arange(200, dtype=dtype)
    np.save(tmp_path / "a.npy", tokens)
    tokens.tofile(tmp_path / "a.bin")
    for name in ("a.npy", "a.bin"):
        found = corpus(tmp_path / name, dtype=dtype)
        assert found.training.read(0, 150).tolist() == list(range(150))
        assert found.held_out.read(0, 50).tolist() == list(range(150, 200))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_signed_arrays_are_taken_where_they_fit(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(200, dtype=dtype))
    assert corpus(tmp_path / "a.npy").training.read(0, 150).tolist() == list(range(150))
    for token in (-1, 256):
        np.save(tmp_path / "a.npy", np.array([*range(199), token], dtype))
        with pytest.raises(
            DataError, match=rf"^data.path: '.*a.npy' has token {token} at 199, beyond a vocabulary of 256; "
        ):
            corpus(tmp_path / "a.npy")


def _wrong_dtype(folder: Path) -> Path:
    np.save(folder / "a.npy", np.zeros(100, np.float64))
    return folder / "a.npy"


def _two_dimensions(folder: Path) -> Path:
    np.save(folder / "a.npy", np.zeros((10, 10), np.uint16))
    return folder / "a.npy"


def _cut_short(folder: Path) -> Path:
    np.save(folder / "a.npy", np.zeros(1000, np.uint16))
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:500])
    return folder / "a.npy"


def _not_numpy(folder: Path) -> Path:
    (folder / "a.npy").write_text("hello")
    return folder / "a.npy"


def _odd(folder: Path) -> Path:
    (folder / "a.bin").write_bytes(b"x" * 101)
    return folder / "a.bin"


def _large_id(folder: Path) -> Path:
    np.array([1, 2, 300] * 100, np.uint16).tofile(folder / "a.bin")
    return folder / "a.bin"


def _empty(folder: Path) -> Path:
    (folder / "a.txt").touch()
    return folder / "a.txt"


def _short(folder: Path) -> Path:
    (folder / "a.txt").write_text("too short")
    return folder / "a.txt"


def _short_tail(folder: Path) -> Path:
    (folder / "a.txt").write_text("x" * 30)
    return folder / "a.txt"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.txt")
    return folder / "a.txt"


def _mixed(folder: Path) -> Path:
    (folder / "a.bin").write_bytes(b"xx")
    (folder / "b.txt").write_bytes(b"xx")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere", "'{}' does not exist; give a text file, a folder of them, or .npy/.bin tokens"),
        (lambda f: f, "'{}' is empty; give a file or folder with text or tokens"),
        (_empty, "'{}' is empty; give a file or folder with text or tokens"),
        (
            _short,
            "'{}' has 7 tokens to train on, fewer than a sequence and its next token (9); "
            "shorten train.sequence_length or give more data",
        ),
        (
            _short_tail,
            "'{}' leaves 8 tokens held out, fewer than a sequence and its next token (9); "
            "raise data.held_out, set it to 0, or give more data",
        ),
        (_wrong_dtype, "'{}' holds float64[100]; give one dimension of uint16, uint32, int32 or int64"),
        (_two_dimensions, "'{}' holds uint16[10, 10]; give one dimension of uint16, uint32, int32 or int64"),
        (_cut_short, "'{}' is not a whole .npy array of numbers; write it with numpy.save"),
        (_not_numpy, "'{}' is not a whole .npy array of numbers; write it with numpy.save"),
        (_odd, "'{}' has 101 bytes, not a multiple of uint16's 2; set data.dtype to what it holds"),
        (
            _large_id,
            "'{}' has token 300 at 2, beyond a vocabulary of 256; "
            "raise model.vocabulary or prepare the data with its tokenizer",
        ),
        (_pipe, "'{}' is neither a file nor a folder"),
        (_mixed, "'{}' mixes tokens ('{}/a.bin') and text ('{}/b.txt'); separate them"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line(tmp_path: Path, make: object, message: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        corpus(path)
    assert str(caught.value) == "data.path: " + message.replace("{}", str(path))


def test_uint16_cannot_hold_the_tokens_of_a_large_vocabulary(tmp_path: Path) -> None:
    np.zeros(4000, np.uint16).tofile(tmp_path / "a.bin")
    table: dict[str, dict[str, Any]] = {
        "data": {"path": str(tmp_path)}, "model": {"vocabulary": 2**16}, "train": {"sequence_length": 16},
    }  # fmt: skip
    assert open_corpus(build_config(table))
    table["model"]["vocabulary"] += 1
    with pytest.raises(DataError) as caught:
        open_corpus(build_config(table))
    assert str(caught.value) == (
        "data.dtype: uint16 cannot hold the tokens of a vocabulary of 65537; write them as uint32 and set it to that"
    )
    table["data"]["dtype"] = "uint32"
    assert open_corpus(build_config(table))


def test_bytes_need_a_vocabulary_of_256(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    table = {"data": {"path": str(tmp_path)}, "model": {"vocabulary": 100}, "train": {"sequence_length": 4}}
    with pytest.raises(DataError, match=r"^model.vocabulary: 100; bytes of text need 256$"):
        open_corpus(build_config(table))


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 300), ("int32", -1)])
def test_a_token_beyond_the_vocabulary_that_comes_late_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, token: int
) -> None:
    monkeypatch.setattr(token_files, "_CHECKED_TOKENS", 10)
    np.array([1] * 10 + [token] * 290, dtype).tofile(tmp_path / "a.bin")
    if dtype == "int32":
        lengths_offsets_marks = np.array([300], "<i4").tobytes() + np.array([0, 0, 1], "<i8").tobytes()
        (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 1, 2) + lengths_offsets_marks)
    found = corpus(tmp_path / "a.bin")
    with pytest.raises(DataError) as caught:
        found.batch(1)
    assert str(caught.value) == (
        f"data.path: token {token} does not fit a vocabulary of 256; raise model.vocabulary or prepare the data with its tokenizer"
    )


def test_a_file_that_shrinks_during_a_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 1000)
    found = corpus(file)
    file.write_text("x")
    with pytest.raises(DataError, match=r"^data.path: '.*a.txt' became shorter; leave the data alone"):
        found.batch(1)
    file.unlink()
    with pytest.raises(DataError, match=r"^data.path: '.*a.txt' cannot be read any more"):
        found.batch(1)
