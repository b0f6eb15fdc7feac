"""What is prepared is, token for token, what the tokenizer makes of each document, whatever file held it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from making import (
    PLANES,
    SPECIAL,
    WORDS,
    byte_level,
    documents,
    histogram,
    own,
    prepare,
    tree,
    write_lines,
    write_tokenizer,
)
from tokenizers import models, pre_tokenizers, processors

from helixpipe.cli import main
from helixpipe.data import records, shards
from helixpipe.data.prepared import Prepared

TEXTS = [
    WORDS, PLANES, "x", "\n", " ", "a\r\nb\r\n\r\nc", "nul \0 inside", "\ufeffmarked", "é" * 50, "\u2028line\u2029", "\x85next",
    "<|end|> said in a text", "A" * 3000, "\U0010ffff\uffff\ud7ff\ue000",
]  # fmt: skip


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def write_dataset(folder: Path, texts: list[str]) -> None:
    """As datasets' save_to_disk writes it: streams of record batches, and state.json that lists them."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    half = len(texts) // 2
    for name, part in zip(names, (texts[:half], texts[half:]), strict=True):
        table = pyarrow.table({"text": part, "n": list(range(len(part)))})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")


def test_every_kind_of_file_gives_the_tokenizer_s_own_tokens(tmp_path: Path, tokenizer: Path) -> None:
    wanted = own(tokenizer, TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[:7])) + gzip.compress(lines_of(TEXTS[7:])))
    packed = zstandard.ZstdCompressor()
    (tmp_path / "c.jsonl.zst").write_bytes(packed.compress(lines_of(TEXTS[:7])) + packed.compress(lines_of(TEXTS[7:])))
    table = pyarrow.table({"other": [{"deep": [1]}] * len(TEXTS), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=5)
    with pyarrow.OSFile(str(tmp_path / "e.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array(TEXTS).dictionary_encode()}), tmp_path / "f.pq", compression="zstd"
    )
    write_dataset(tmp_path / "g", TEXTS)
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrow", "f.pq", "g")):
        assert documents(prepare(tmp_path / f"out{number}", tokenizer, tmp_path / name)) == wanted, name
    for number in range(7):
        shutil.rmtree(tmp_path / f"out{number}")
    assert documents(prepare(tmp_path.parent / f"{tmp_path.name}-all", tokenizer, tmp_path)) == wanted * 7


def test_a_text_file_is_a_document_byte_for_byte(tmp_path: Path, tokenizer: Path) -> None:
    texts = ["one\r\ntwo\r\n", "no end", PLANES, "x", "tail\n\n\n"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "empty.txt").touch()
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + b"after the mark")
    (tmp_path / ".hidden").write_text("hidden")
    found = prepare(tmp_path.parent / f"{tmp_path.name}-out", tokenizer, tmp_path)
    assert documents(found) == own(tokenizer, [*texts, "after the mark"])
    assert found.manifest["skipped"]["short"] == 1


def test_lines_of_a_text_are_documents_when_asked(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n\ntwo \nthree\rstill three\n" + b"last")
    wanted = own(tokenizer, ["one", "two ", "three\rstill three", "last"])
    for size in (1, 2, 3, 5, 100):
        monkeypatch.setattr(records, "UNIT_BYTES", size)
        found = prepare(tmp_path / f"out{size}", tokenizer, tmp_path / "a.txt", "--split-lines")
        assert documents(found) == wanted
    assert found.manifest["skipped"]["short"] == 2


@pytest.mark.parametrize("size", [1, 17, 64, 1000])
def test_where_units_are_cut_changes_no_token(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(records, "UNIT_BYTES", size)
    monkeypatch.setattr(shards, "SHARD_TOKENS", size)
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines_of(TEXTS).replace(b"\n", b"\r\n \n"))
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=3)
    found = prepare(tmp_path / "out", tokenizer, tmp_path / "a.jsonl", tmp_path / "b.parquet")
    wanted = own(tokenizer, TEXTS * 2)
    assert documents(found) == wanted
    assert found.lengths.tolist() == [len(each) for each in wanted]
    if size < 1000:
        assert len(found.shards) > 3


def test_a_line_of_10_megabytes(tmp_path: Path) -> None:
    """Of long words, so that it takes no long time."""
    words = {"é" * 400 + str(i): i for i in range(50)} | {"before": 50, "after": 51, "<|end|>": 52}
    made = tokenizers.Tokenizer(models.WordLevel(words))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = write_tokenizer(tmp_path / "tokenizer", made)
    text = " ".join(list(words)[i * i % 50] for i in range(12_400))
    assert len(text.encode()) > 9_800_000
    write_lines(tmp_path / "a.jsonl", [{"text": "before"}, {"text": text}, {"text": "after"}])
    assert documents(prepare(tmp_path / "out", tokenizer, tmp_path / "a.jsonl")) == own(
        tokenizer, ["before", text, "after"]
    )


def test_the_manifest_tells_what_is_there(tmp_path: Path, tokenizer: Path) -> None:
    texts = ["a " * count for count in (1, 2, 5, 9, 40, 200, 3)]
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, ""]])
    found = prepare(tmp_path / "out", tokenizer, file, "--min-tokens", 3, "--max-tokens", 300)
    wanted = [ids for ids in own(tokenizer, texts) if 3 <= len(ids) - 1 <= 300]
    assert documents(found) == wanted
    told = found.manifest
    lengths = [len(each) for each in wanted]
    assert (told["documents"], told["tokens"], told["counted"]) == (len(wanted), sum(lengths), sum(lengths))
    assert told["lengths"] == histogram(lengths)
    assert told["largest_token"] == max(map(max, wanted))
    assert told["skipped"]["short"] + told["skipped"]["long"] + len(wanted) == 8
    assert told["skipped"]["long"] == 1
    assert told["inputs"] == [{"path": str(file), "kind": "lines", "packing": "", "size_bytes": file.stat().st_size}]
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert told["tokenizer"]["files"].keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert (told["dtype"], told["vocabulary"]) == ("uint16", byte_level().get_vocab_size())
    assert not list((tmp_path / "out").glob("*.mask"))


def test_empty_documents_are_kept_when_asked(tmp_path: Path, tokenizer: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}, {"text": ""}])
    assert documents(prepare(tmp_path / "out", tokenizer, file, "--min-tokens", 0)) == own(tokenizer, ["", "x", ""])
    none = prepare(tmp_path / "none", tokenizer, file, "--min-tokens", 0, "--end-token", "none")
    assert documents(none) == own_without_end(tokenizer, ["x"])


def own_without_end(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    return [ids[:-1] for ids in own(tokenizer, texts)]


def test_only_the_completion_counts(tmp_path: Path, tokenizer: Path) -> None:
    pairs = [("Add 1 and 2.", " 3"), ("", "all"), ("none", ""), ("é", "日本" * 9)]
    file = write_lines(tmp_path / "a.jsonl", [{"p": prompt, "c": completion} for prompt, completion in pairs])
    found = prepare(tmp_path / "out", tokenizer, file, "--prompt", "p", "--completion", "c")
    for i, (prompt, completion) in enumerate(pairs):
        before, after = own_without_end(tokenizer, [prompt])[0], own(tokenizer, [completion])[0]
        assert found.tokens(i).tolist() == before + after
        assert found.mask(i).tolist() == [False] * len(before) + [True] * len(after)
    assert found.manifest["counted"] == sum(int(found.mask(i).sum()) for i in range(len(pairs)))
    assert list((tmp_path / "out").glob("*.mask"))


def test_what_the_tokenizer_adds_is_added_once(tmp_path: Path) -> None:
    """A tokenizer that puts a token before each text, and its end token after it."""
    made = byte_level()
    ids = {name: made.token_to_id(name) for name in SPECIAL}
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|end|>", special_tokens=[(name, ids[name]) for name in ("<|im_start|>", "<|end|>")]
    )
    made.enable_truncation(4)
    made.enable_padding(length=64)
    folder = write_tokenizer(tmp_path / "tokenizer", made)
    plain = byte_level()
    text = "a longer text than four tokens"
    file = write_lines(tmp_path / "a.jsonl", [{"text": text, "p": "ask", "c": "tell"}])
    begin, end = ids["<|im_start|>"], ids["<|end|>"]
    assert documents(prepare(tmp_path / "out", folder, file)) == [[begin, *plain.encode(text).ids, end]]
    found = prepare(tmp_path / "pair", folder, file, "--prompt", "p", "--completion", "c")
    before, after = plain.encode("ask").ids, plain.encode("tell").ids
    assert documents(found) == [[begin, *before, *after, end]]
    assert found.mask(0).tolist() == [False] * (1 + len(before)) + [True] * (len(after) + 1)
    for number, (text, kept) in enumerate((("ab", 1), ("", 0))):  # added tokens do not make a document long enough
        one = write_lines(tmp_path / f"{number}.jsonl", [{"text": text}, {"text": "enough"}])
        assert len(prepare(tmp_path / f"out{number}", folder, one)) == kept + 1


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(70_000)} | {"<|end|>": 70_000}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = write_tokenizer(tmp_path / "tokenizer", made)
    file = write_lines(tmp_path / "a.jsonl", [{"text": "w69999 w1 unknown"}])
    found = prepare(tmp_path / "out", folder, file)
    assert documents(found) == [[69_999, 1, 0, 70_000]]
    assert (found.dtype, found.manifest["vocabulary"]) == ("uint32", 70_001)
    assert found.tokens(0).dtype == np.uint32


def test_the_end_token_is_the_one_that_is_named(tmp_path: Path, tokenizer: Path) -> None:
    ids = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    bare = tokenizer / "tokenizer.json"
    made = write_tokenizer(tmp_path / "mapped", eos_token={"content": "<|im_end|>"})
    generation = write_tokenizer(tmp_path / "generation", eos_token=None)
    (generation / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|im_start|>"], 0]}))
    for number, (given, asked, wanted) in enumerate(
        [
            (tokenizer, [], "<|end|>"),
            (tokenizer, ["--end-token", "<|im_end|>"], "<|im_end|>"),
            (bare, ["--end-token", str(ids["<|im_start|>"])], "<|im_start|>" if ids["<|im_start|>"] > 9 else None),
            (made, [], "<|im_end|>"),
            (generation, [], "<|im_start|>"),
        ]
    ):
        found = prepare(tmp_path / f"out{number}", given, file, *asked)
        # a digit is a token of its own, and the token comes before the id
        end = ids[wanted] if wanted else ids[str(ids["<|im_start|>"])]
        assert found.tokens(0).tolist()[-1] == end == found.manifest["end_token"]


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    file = write_lines(tmp_path / "a.jsonl", [{"text": "abba"}])
    found = prepare(tmp_path / "out", folder, file)
    assert documents(found) == [[vocabulary[word] for word in ("ab", "b", "a", "<|endoftext|>")]]
    assert (tmp_path / "out/tokenizer/tokenizer.json").exists()


def test_json_goes_to_standard_output_and_progress_to_standard_error(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "some words"}] * 3)
    given = ["prepare", str(file), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*given, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert out.count("\n") == 1
    assert (told["folder"], told["documents"]) == (str(tmp_path / "out"), 3)
    assert told["tokens"] == sum(map(len, own(tokenizer, ["some words"] * 3)))
    assert "100% of 0.0 MB  " in err
    assert " tokens/s  0 s left\n" in err
    before, inodes = tree(tmp_path / "out"), {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    assert main(given) == 0  # what is whole is left as it is, and not done again
    assert inodes == {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    assert capsys.readouterr().out == (
        f"{tmp_path}/out: 3 documents, {told['tokens']} tokens, of which {told['tokens']} count; "
        f"vocabulary {told['vocabulary']}\n"
    )
    assert tree(tmp_path / "out") == before
    assert Prepared.open(tmp_path / "out").manifest["documents"] == 3
