"""Tokenizers and inputs made on the spot, and the command run on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from helixpipe.cli import main
from helixpipe.data.prepared import Prepared

WORDS = "The quick brown fox jumps over the lazy dog, and then it rests.\nself.value = value + 1\n été naïve 日本語 😀 "
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
# every Unicode plane that has letters for people or for private use, and what stands at their edges
PLANES = "".join(
    chr((plane << 16) + at) for plane in range(17) for at in (0x41, 0x3042, 0xFFFD) if (plane, at) != (0, 0)
)


def byte_level(size: int = 400) -> tokenizers.Tokenizer:
    """A byte-level BPE: it knows every text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    made.train_from_iterator([WORDS] * 4, trainer)
    return made


def write_tokenizer(folder: Path, made: tokenizers.Tokenizer | None = None, template: str = "", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (made or byte_level()).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepare(output: Path, tokenizer: Path, *arguments: object) -> Prepared:
    """The command, which must succeed, and what it wrote."""
    given = ["prepare", *map(str, arguments), "--tokenizer", str(tokenizer), "--output", str(output)]
    if "--workers" not in given:
        given += ["--workers", "1"]
    assert main(given) == 0
    return Prepared.open(output)


def refused(capsys: pytest.CaptureFixture[str], output: Path, tokenizer: Path, *arguments: object) -> str:
    """The one line of a command that must fail."""
    given = ["prepare", *map(str, arguments), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", "1"]
    capsys.readouterr()
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *progress, told = err.splitlines()
    assert all("tokens/s" in each or each.startswith(("skipped ", "goes on")) for each in progress)
    assert not (output / "manifest.json").exists()
    return told.removeprefix("helixpipe: error: ")


def documents(found: Prepared) -> list[list[int]]:
    return [found.tokens(i).tolist() for i in range(len(found))]


def own(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    """What the library itself makes of documents, each with the end token."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = library.token_to_id("<|end|>")
    return [[*library.encode(text).ids, end] for text in texts]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def histogram(lengths: Sequence[int]) -> dict[str, int]:
    """Documents by the largest power of two that is not above their length."""
    found: dict[str, int] = {}
    for power in range(40):
        count = int(((np.array(lengths) >= 2**power) & (np.array(lengths) < 2 ** (power + 1))).sum())
        if count:
            found[str(2**power)] = count
    return found
