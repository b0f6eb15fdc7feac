"""Prepared folders and Megatron's pairs as they are read: documents, masks, and what is not whole is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from making import WORDS, own, prepare, write_lines, write_tokenizer

from helixpipe.config_text import build_config
from helixpipe.data import records, shards
from helixpipe.data.prepared import Megatron, Prepared, open_documents
from helixpipe.errors import DataError
from helixpipe.train.data import Corpus, open_corpus

IGNORED = -100
CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


@pytest.fixture
def pairs(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Prompts and completions of all lengths, in many shards."""
    monkeypatch.setattr(records, "UNIT_BYTES", 600)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    draw = np.random.default_rng(0)
    rows = [{"p": WORDS[: draw.integers(60)], "c": WORDS[: draw.integers(60)]} for _ in range(80)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    return prepare(tmp_path / "out", tokenizer, file, "--prompt", "p", "--completion", "c")


def test_documents_and_masks_are_those_of_the_whole(pairs: Prepared) -> None:
    assert len(pairs.shards) > 10
    tokens = np.concatenate([np.fromfile(shard.path, "uint16") for shard in pairs.shards])
    assert np.concatenate([pairs.tokens(i) for i in range(len(pairs))]).tolist() == tokens.tolist()
    assert pairs.lengths.tolist() == [len(pairs.tokens(i)) for i in range(len(pairs))]
    assert isinstance(pairs.tokens(0).base, np.memmap) or isinstance(pairs.tokens(0), np.memmap)
    assert sum(int(pairs.mask(i).sum()) for i in range(len(pairs))) == pairs.manifest["counted"]
    for i in range(len(pairs)):
        mask = pairs.mask(i)
        assert mask[-1]
        assert (np.diff(mask.astype(int)) >= 0).all()  # the prompt does not count, and all after it does
    for wrong in (-1, len(pairs)):
        with pytest.raises(IndexError):
            pairs.tokens(wrong)


def test_what_is_not_whole_is_refused(pairs: Prepared, tmp_path: Path) -> None:
    folder = pairs.folder
    name = pairs.shards[1].path

    def refused() -> str:
        with pytest.raises(DataError) as caught:
            Prepared.open(folder)
        return str(caught.value)

    for suffix in (".tokens", ".documents", ".mask"):
        path = name.with_suffix(suffix)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert refused() == (
            f"data.path: '{path}' has {len(content) - 1:,} bytes, and {len(content):,} are known of; prepare it anew"
        )
        path.unlink()
        assert refused() == f"data.path: '{path}' cannot be read: no such file or directory; prepare it anew"
        path.write_bytes(content)
    begins = name.with_suffix(".documents")
    content = begins.read_bytes()
    begins.write_bytes(content[:-8] + bytes(8))
    assert refused().endswith(f"cannot be read as prepared: {begins.name} does not end where its tokens do")
    begins.write_bytes(content)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    told = f"data.path: '{folder}' cannot be read as prepared: its manifest.json "
    manifest.write_text(text.replace('"counted": ', '"counted": 1', 1))
    assert refused() == told + "was changed; prepare it anew"
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    assert refused() == told + "is of version 2, and only 1 is known; prepare it anew"
    manifest.write_text("{}")
    assert refused() == told + "is not one of helixpipe prepare"
    manifest.unlink()
    assert refused() == f"data.path: '{folder}' has no manifest.json; it is not what helixpipe prepare writes"
    (folder / "journal.jsonl").touch()
    assert refused() == (
        f"data.path: '{folder}' cannot be read as prepared: its preparation has not ended; "
        "give the same helixpipe prepare again, which goes on"
    )
    with pytest.raises(DataError, match="its preparation has not ended"):
        corpus(folder)
    manifest.write_text(text)
    assert Prepared.open(folder).lengths.tolist() == pairs.lengths.tolist()


def write_megatron(
    prefix: Path, sequences: Sequence[Sequence[int]], marks: Sequence[int], dtype: str, modes: bool
) -> Path:
    """A pair byte for byte as Megatron writes it."""
    width = np.dtype(dtype).itemsize
    lengths = [len(each) for each in sequences]
    offsets = [width * sum(lengths[:i]) for i in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(marks))
    arrays = np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes() + np.array(marks, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(head + arrays + (bytes(len(lengths)) if modes else b""))
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(each, dtype).tobytes() for each in sequences))
    return prefix


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [False, True])
def test_documents_of_a_megatron_pair(tmp_path: Path, dtype: str, modes: bool) -> None:
    sequences = [[1, 2, 3], [4], [], [5, 6], list(range(7, 90))]
    prefix = write_megatron(tmp_path / "my.text_document", sequences, [0, 2, 3, 5], dtype, modes)
    for path in (prefix, Path(f"{prefix}.bin")):
        found = open_documents(path)
        assert len(found) == 3
        assert [found.tokens(i).tolist() for i in range(3)] == [[1, 2, 3, 4], [], [5, 6, *range(7, 90)]]
        assert found.lengths.tolist() == [4, 0, 85]
        assert found.mask(2).tolist() == [True] * 85
        with pytest.raises(IndexError):
            found.tokens(3)
    assert corpus(prefix, vocabulary=128).training.read(0, 6).tolist() == [1, 2, 3, 4, 5, 6]


def test_an_index_whose_documents_cannot_be_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[1, 2], [3]], [0, 1], "int32", False)
    mend = "write the index of its .bin anew, or take it away and set data.dtype"
    for marks in ([0, 1], [1, 2], [0, 2, 1, 2], []):
        write_megatron(tmp_path / "a", [[1, 2], [3]], marks, "int32", False)
        with pytest.raises(DataError) as caught:
            Megatron.open(tmp_path / "a")
        assert (
            str(caught.value) == f"data.path: '{tmp_path}/a.idx' has document marks that are not its sequences'; {mend}"
        )
    write_megatron(tmp_path / "a", [[1, 2], [3]], [0, 1, 2], "int32", False)
    index = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(index.replace(struct.pack("<qq", 0, 8), struct.pack("<qq", 4, 0)))
    with pytest.raises(DataError) as caught:
        Megatron.open(tmp_path / "a")
    assert str(caught.value) == (
        f"data.path: '{tmp_path}/a.idx' has sequences that do not follow one another in its .bin; {mend}"
    )
    (tmp_path / "a.idx").unlink()
    with pytest.raises(DataError, match=r"a.bin' has no .idx beside it; documents of a .bin are known by its index"):
        open_documents(tmp_path / "a.bin")


# training


def corpus(path: Path, vocabulary: int = 512, held_out: float = 0.25, length: int = 16) -> Corpus:
    table = {
        "data": {"path": str(path), "held_out": held_out},
        "model": {"vocabulary": vocabulary},
        "train": {"sequence_length": length, "microbatch_size": 2},
        "schedule": {"microbatches": 2},
    }
    return open_corpus(build_config(table))


def test_training_reads_windows_over_the_documents(pairs: Prepared) -> None:
    tokens = np.concatenate([pairs.tokens(i) for i in range(len(pairs))]).tolist()
    counts = np.concatenate([pairs.mask(i) for i in range(len(pairs))]).tolist()
    found = corpus(pairs.folder)
    assert found.remarks == ()
    training, held_out = len(found.training), len(found.held_out)
    assert training + held_out == len(tokens)
    assert found.training.read(0, training).tolist() + found.held_out.read(0, held_out).tolist() == tokens
    assert found.training.counted(0, training).tolist() + found.held_out.counted(0, held_out).tolist() == counts
    seen = 0
    # the positions of training are a ring: the row that has both its ends goes on at its beginning
    last, rows = training - 1, 20 * 4
    ring = [at % last for at in range(last + 16)]
    runs = [ring[at : at + 16] for at in range(last)], [range(at, at + 16) for at in range(training, len(tokens) - 16)]
    for number, batch in enumerate((*(found.batch(step) for step in range(1, 21)), *found.evaluation(5))):
        for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            if targets == [IGNORED] * 16:
                continue
            assert any(
                [tokens[at] for at in run] == row
                and [tokens[at + 1] if counts[at + 1] else IGNORED for at in run] == targets
                for run in runs[number >= 20]
            )
            seen += 1
    assert seen > rows * 3 // 4


def test_whole_documents_are_held_out(pairs: Prepared) -> None:
    ends = np.cumsum([0, *pairs.lengths])
    for share in (0.1, 0.25, 0.5):
        training = len(corpus(pairs.folder, held_out=share).training)
        wanted = round(int(ends[-1]) * (1 - share))
        assert training == min(ends, key=lambda end: (abs(end - wanted), end))
    assert len(corpus(pairs.folder, held_out=0.0).training) == ends[-1]


def test_what_data_is_known_by_includes_its_mask(pairs: Prepared) -> None:
    before = corpus(pairs.folder).fingerprint()
    for shard in pairs.shards:
        bits = np.fromfile(shard.mask_path, np.uint8)
        (~bits).tofile(shard.mask_path)
    assert corpus(pairs.folder).fingerprint()[:2] == before[:2]
    assert corpus(pairs.folder).fingerprint() != before


def test_unmasked_data_trains_as_its_tokens_do(tmp_path: Path, tokenizer: Path) -> None:
    """The same tokens as a .bin give the same batches."""
    file = write_lines(tmp_path / "a.jsonl", [{"text": WORDS[i:]} for i in range(30)])
    found = prepare(tmp_path / "out", tokenizer, file)
    np.concatenate([found.tokens(i) for i in range(30)]).tofile(tmp_path / "a.bin")
    one, other = (corpus(tmp_path / name, held_out=0.0) for name in ("out", "a.bin"))
    assert one.fingerprint() == other.fingerprint()
    for step in range(1, 4):
        assert (one.batch(step).tokens == other.batch(step).tokens).all()
        assert (one.batch(step).targets == other.batch(step).targets).all()


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "!" * 100}])
    found = prepare(tmp_path / "out", tokenizer, file)
    largest, own_words = found.manifest["largest_token"], found.manifest["vocabulary"]
    assert largest == max(own(tokenizer, ["!" * 100])[0])
    with pytest.raises(DataError) as caught:
        corpus(tmp_path / "out", vocabulary=largest)
    assert str(caught.value) == (
        f"data.path: '{tmp_path}/out' has token {largest}, beyond a vocabulary of {largest}; "
        f"raise model.vocabulary to {own_words}, its tokenizer's, or prepare it with the model's"
    )
    assert corpus(tmp_path / "out", vocabulary=largest + 1, held_out=0.0).remarks == (
        f"data.path: the tokenizer of '{tmp_path}/out' has {own_words} words, more than the {largest + 1} of "
        "model.vocabulary; no token of the data is beyond these",
    )


def test_a_prepared_folder_among_others_is_named(pairs: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        corpus(tmp_path)
    assert str(caught.value) == (
        f"data.path: '{pairs.folder}' is what helixpipe prepare wrote; give it by itself, not '{tmp_path}'"
    )


def test_too_few_documents_to_hold_one_out(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    file = write_lines(tmp_path / "a.jsonl", [{"text": WORDS}])
    prepare(tmp_path / "out", folder, file)
    with pytest.raises(DataError, match=r"leaves 0 tokens held out, fewer than a sequence and its next token \(17\)"):
        corpus(tmp_path / "out")


def test_the_manifest_is_json_with_its_digest(pairs: Prepared) -> None:
    told = json.loads((pairs.folder / "manifest.json").read_text())
    assert told == pairs.manifest
    assert told["digest"].startswith("sha256:")
