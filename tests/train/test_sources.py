"""Sources as a config gives them: documents packed and held out, mixtures, and what cannot be is one line."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from processes import printed

from helixpipe.config import Config
from helixpipe.config_text import build_config, to_table
from helixpipe.data.inputs import MANIFEST
from helixpipe.data.journal import FORMAT, VERSION, digest
from helixpipe.errors import DataError, HelixpipeError
from helixpipe.train.data import Batch, Corpus, open_corpus
from helixpipe.train.held_out import tensors
from helixpipe.train.layouts import open_reading

IGNORED = -100
VOCABULARY = 50_000
LENGTHS = [9, 1, 30, 5, 17, 2, 12, 40, 7, 3, 25, 16, 8, 33, 11, 6, 20, 14, 4, 10] * 3


def write_prepared(
    folder: Path, lengths: list[int], first: int = 0, masked: bool = False, tokenizer: str = "a"
) -> Path:
    """A prepared folder of two shards, whose tokens are first, first + 1, ..., so that each is known again."""
    folder.mkdir()
    shards, at = [], first
    for name, mine in (("00000-000", lengths[: len(lengths) // 3]), ("00000-001", lengths[len(lengths) // 3 :])):
        tokens = np.arange(at, at + sum(mine))
        tokens.astype("uint16").tofile(folder / f"{name}.tokens")
        np.array([0, *np.cumsum(mine)], "uint64").tofile(folder / f"{name}.documents")
        counts = counted(tokens) if masked else np.ones(len(tokens), bool)
        if masked:
            np.packbits(counts, bitorder="little").tofile(folder / f"{name}.mask")
        shards.append({"name": name, "documents": len(mine), "tokens": len(tokens), "counted": int(counts.sum())})
        at += len(tokens)
    manifest = {
        "format": FORMAT, "version": VERSION, "dtype": "uint16", "shards": shards, "vocabulary": VOCABULARY,
        "largest_token": at - 1, "tokenizer": {"digest": f"sha256:{tokenizer * 64}"},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}))
    return folder


def counted(tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens are targets where some are not."""
    return tokens % 3 != 0


def config(path: Any, length: int = 24, held_out: float = 0.2, microbatches: int = 2, **data: Any) -> Config:
    sections = dict(data)
    train = {"sequence_length": length, "microbatch_size": sections.pop("size", 1), "seed": sections.pop("seed", 0)}
    return build_config({
        "data": {"path": path, "held_out": held_out, **sections},
        "model": {"vocabulary": VOCABULARY},
        "train": train,
        "schedule": {"microbatches": microbatches},
    })  # fmt: skip


def corpus(path: Any, **given: Any) -> Corpus:
    return open_corpus(config(path, **given))


def documents_of(lengths: list[int], first: int = 0) -> list[range]:
    """The tokens of each document."""
    found = []
    for length in lengths:
        found.append(range(first, first + length))
        first += length
    return found


def check_rows(batch: Batch, owner: dict[int, int], masked: bool = False) -> list[int]:
    """Each row is documents one after another, and no target is another document's; the tokens that were asked for."""
    asked = []
    for row, targets, lengths in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.documents, strict=True):
        assert sum(lengths) == len(row)
        at = 0
        for length in lengths:
            run, wanted = row[at : at + length], targets[at : at + length]
            at += length
            if set(run) == {0} and set(wanted) == {IGNORED}:
                continue  # padding
            assert run == list(range(run[0], run[0] + length))
            assert len({owner[token] for token in run}) == 1
            for token, target in zip(run, wanted, strict=True):
                if target == IGNORED:
                    assert owner.get(token + 1) != owner[token] or (masked and (token + 1) % 3 == 0)
                    continue
                assert target == token + 1
                assert owner[target] == owner[token]
                assert not masked or target % 3
                asked.append(target)
    return asked


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packing", ["documents", "balanced"])
def test_documents_of_a_folder_are_read_once_an_epoch_and_those_held_out_never(
    tmp_path: Path, packing: str, masked: bool
) -> None:
    folder = write_prepared(tmp_path / "a", LENGTHS, masked=masked)
    found = corpus(str(folder), packing=packing, look_ahead=1)
    documents = documents_of(LENGTHS)
    owner = {token: number for number, document in enumerate(documents) for token in document}
    border = len(found.training)
    assert border in np.cumsum(LENGTHS)
    assert abs(border - 0.8 * sum(LENGTHS)) <= max(LENGTHS) / 2
    layout = found.reading.layouts[0]
    steps = len(layout) // 2
    asked = [token for step in range(1, steps + 1) for token in check_rows(found.batch(step), owner, masked)]
    if len(layout) % 2:
        more = check_rows(found.batch(steps + 1), owner, masked)
        assert max(Counter(asked + more).values()) <= 2
        asked = list({*asked, *more})
    trained = {token for document in documents for token in document[1:] if token < border}
    wanted = {token for token in trained if not masked or token % 3}
    assert wanted >= set(asked)
    if not len(layout) % 2:
        assert sorted(asked) == sorted(wanted)
    evaluated = [token for batch in found.evaluation(1000) for token in check_rows(batch, owner, masked)]
    assert len(evaluated) == len(set(evaluated))
    assert set(evaluated) == {
        token for document in documents for token in document[1:] if token >= border and (not masked or token % 3)
    }


def test_documents_of_a_pair_and_of_text_are_packed(tmp_path: Path) -> None:
    lengths = LENGTHS[:12]
    np.arange(sum(lengths), dtype=np.int32).tofile(tmp_path / "p.bin")
    offsets = 4 * (np.cumsum(lengths) - lengths)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
    marks = np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    (tmp_path / "p.idx").write_bytes(
        head + np.array(lengths, "<i4").tobytes() + offsets.astype("<i8").tobytes() + marks
    )
    found = corpus(str(tmp_path / "p"), packing="documents")
    owner = {token: number for number, document in enumerate(documents_of(lengths)) for token in document}
    assert len(found.training) in np.cumsum(lengths)
    assert check_rows(found.batch(1), owner)

    (tmp_path / "text").mkdir()
    for name in "abcde":
        (tmp_path / "text" / f"{name}.txt").write_text(name * 15)
    found = corpus(str(tmp_path / "text"), packing="documents", length=30)
    assert len(found.held_out) == 15
    for row, lengths in zip(found.batch(1).tokens.tolist(), found.batch(1).documents, strict=True):
        assert lengths == (14, 14, 2)
        assert len(set(row[:14])) == len(set(row[14:28])) == 1, "a file is a document"


def test_windows_with_a_mask_keep_targets_within_documents(tmp_path: Path) -> None:
    found = corpus(str(write_prepared(tmp_path / "a", LENGTHS, masked=True)), document_mask=True)
    owner = {token: number for number, document in enumerate(documents_of(LENGTHS)) for token in document}
    rows = len(found.reading.layouts[0])
    asked = Counter(t for step in range(1, rows // 2 + 1) for t in check_rows(found.batch(step), owner, masked=True))
    assert set(asked.values()) == {1}
    assert sum(asked.values()) > 0.5 * len(found.training)
    assert all(batch.documents for batch in found.evaluation(3))


def test_without_a_mask_no_documents_are_told(tmp_path: Path) -> None:
    folder = str(write_prepared(tmp_path / "a", LENGTHS))
    for given in ({}, {"packing": "documents", "document_mask": False}):
        found = corpus(folder, **given)
        assert found.batch(1).documents == ()
        assert "documents" not in tensors(found.batch(1))
        assert found.reading.documents(1) == ()


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_evaluated_rows_are_the_same_whatever_a_batch_or_the_seed_is(tmp_path: Path, packing: str) -> None:
    folder = str(write_prepared(tmp_path / "a", LENGTHS))
    seen = []
    for microbatches, size, seed in ((1, 1, 0), (4, 1, 1), (3, 5, 2)):
        found = corpus(folder, packing=packing, document_mask=True, microbatches=microbatches, size=size, seed=seed)
        rows = [
            (row, targets, documents)
            for batch in found.evaluation(7)
            for row, targets, documents in zip(
                batch.tokens.tolist(), batch.targets.tolist(), batch.documents, strict=True
            )
        ]
        count = found.windows(7)
        assert len(rows) % (microbatches * size) == 0
        assert all(set(targets) == {IGNORED} and sum(documents) == 24 for _, targets, documents in rows[count:])
        seen.append(rows[:count])
    assert seen[0] == seen[1] == seen[2]


def test_a_mixture_reads_each_source_by_its_weight_and_holds_out_of_each(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10_000)):
        write_prepared(tmp_path / name, LENGTHS, first)
    paths = [{"path": str(tmp_path / "a"), "weight": 3}, str(tmp_path / "b")]
    for packing in ("windows", "documents", "balanced"):
        found = corpus(paths, packing=packing, look_ahead=2)
        rows = [row for step in range(1, 21) for row in found.batch(step).tokens.tolist()]
        assert sum(max(row) >= 10_000 for row in rows) == pytest.approx(10, abs=1)
        assert all(max(row) < 10_000 or min(each for each in row if each) >= 10_000 for row in rows)
        evaluated = [row for batch in found.evaluation(8) for row in batch.tokens.tolist() if any(row)]
        assert sum(max(row) >= 10_000 for row in evaluated) == pytest.approx(2, abs=1)
        assert found.described().startswith(f"reads '{tmp_path}/a' (75.0%): ")
        assert [name for name, _ in found.epochs(3)] == [f"'{tmp_path}/a'", f"'{tmp_path}/b'"]


def test_data_is_known_by_every_source_and_by_where_documents_end(tmp_path: Path) -> None:
    a, b = (write_prepared(tmp_path / name, LENGTHS, first) for name, first in (("a", 0), ("b", 10_000)))
    c = write_prepared(tmp_path / "c", [*LENGTHS[:-2], LENGTHS[-1], LENGTHS[-2]])
    assert corpus(str(a)).fingerprint() == corpus(str(c)).fingerprint()
    assert corpus(str(a), packing="documents").fingerprint() != corpus(str(c), packing="documents").fingerprint()
    assert corpus([str(a), str(b)]).fingerprint() != corpus([str(b), str(a)]).fingerprint()


def test_documents_of_steps_are_known_without_reading_tokens(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "a", LENGTHS)
    asked = config(str(folder), packing="balanced", look_ahead=3, size=2, microbatches=3)
    wanted = [open_corpus(asked).batch(step).documents for step in (1, 2, 9)]
    for shard in folder.glob("*.tokens"):
        shard.write_bytes(bytes(shard.stat().st_size))
    reading = open_reading(asked.data, asked.shape(), 24, microbatches=3, microbatch_size=2)
    assert [reading.documents(step) for step in (1, 2, 9)] == wanted


def test_what_is_read_is_told_in_a_line(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "a", [10, 1, 40, 10], masked=False)
    assert corpus(str(folder), held_out=0.0, packing="balanced", look_ahead=2).described() == (
        f"reads '{folder}': 3 documents in 3 sequences of 24 tokens an epoch, padding 20.83%, 1 longer ones cut, "
        "1 of a single token left out; balanced over 2 steps; attention keeps to each document"
    )
    assert corpus(str(folder), held_out=0.0).described() == f"reads '{folder}': 2 windows of 24 tokens an epoch"


def test_batches_are_the_same_in_every_process(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "a", LENGTHS)
    asked = config(str(folder), packing="balanced", look_ahead=4)
    code = (
        "from helixpipe.config_text import build_config; from helixpipe.train.data import open_corpus;"
        f"c = open_corpus(build_config({to_table(asked)!r})); print([c.batch(s).tokens.tolist() for s in (1, 7)])"
    )
    found = open_corpus(asked)
    assert printed(code) == {f"{[found.batch(step).tokens.tolist() for step in (1, 7)]}\n"}


def refused(path: Any, **given: Any) -> str:
    with pytest.raises(HelixpipeError) as caught:
        corpus(path, **given)
    assert isinstance(caught.value, DataError)
    return str(caught.value)


def test_sources_of_several_vocabularies_are_one_line(tmp_path: Path) -> None:
    a, b = (str(write_prepared(tmp_path / name, LENGTHS, tokenizer=name)) for name in "ab")
    (tmp_path / "x.txt").write_text("text " * 100)
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "x.bin")
    assert refused([a, b]) == (
        f"data.path: '{b}' is tokens of the tokenizer sha256:bbbbbbbbbbbb, and '{a}' is tokens of the tokenizer "
        "sha256:aaaaaaaaaaaa; prepare them with one tokenizer"
    )
    text, tokens = str(tmp_path / "x.txt"), str(tmp_path / "x.bin")
    assert refused([a, text]) == (
        f"data.path: '{text}' is text, read as bytes, and '{a}' is tokens of the tokenizer sha256:aaaaaaaaaaaa; "
        "prepare them with one tokenizer"
    )
    assert refused([text, tokens]) == (
        f"data.path: '{tokens}' is tokens of a tokenizer that is not told, and '{text}' is text, read as bytes; "
        "prepare them with one tokenizer"
    )
    assert corpus([a, tokens])
    assert refused([a, str(tmp_path / "nowhere")]).startswith(f"data.path: '{tmp_path}/nowhere' does not exist; ")


def test_tokens_that_do_not_say_where_documents_end_are_one_line(tmp_path: Path) -> None:
    for name in ("x.bin", "x.npy"):
        path = str(tmp_path / name)
        np.arange(500, dtype=np.uint16).tofile(path) if name == "x.bin" else np.save(
            path, np.arange(500, dtype=np.uint16)
        )
        for given in ({"packing": "documents"}, {"document_mask": True}):
            assert refused(path, **given) == (
                f"data.path: '{path}' does not say where its documents end; give what helixpipe prepare wrote, a .bin with "
                "its .idx or text, or leave data.packing and data.document_mask out"
            )


def test_documents_of_which_none_is_left_are_one_line(tmp_path: Path) -> None:
    long = str(write_prepared(tmp_path / "long", [50] * 10))
    assert refused(long, packing="documents", longest="drop") == (
        f"data.path: '{long}' has no document to train on: 8 of 8 are longer than a sequence of 24 and dropped; "
        "set data.longest to cut or lengthen train.sequence_length"
    )
    assert refused(str(write_prepared(tmp_path / "one", [1] * 10)), packing="documents").endswith(
        "has no document to train on: the 8 there are have no token that follows another; give longer documents"
    )
    few = str(write_prepared(tmp_path / "few", [5, 5, 90]))
    assert refused(few, packing="documents", held_out=0.1) == (
        f"data.path: '{few}' holds out no document to evaluate on: whole documents are held out, from the tail, and there are "
        "too few; give more, choose another data.held_out, or set data.held_out to 0"
    )
    assert corpus(few, packing="documents", held_out=0.0)
