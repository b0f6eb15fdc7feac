"""Prepared folders that commands price, and how tests ask for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from making import prepare, write_lines, write_tokenizer
from tokenizers import models, pre_tokenizers

from helixpipe.cli import main
from helixpipe.config_text import build_config
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.train.data import open_corpus

LENGTH = 256
SIZES = f"--ranks 2 --microbatches 4 --model tiny --sequence-length {LENGTH} --hardware laptop-core"


def tailed(documents: int, mean: float, spread: float, longest: int) -> list[int]:
    """Lengths by a law with a long tail."""
    drawn = np.random.default_rng(0).lognormal(mean, spread, documents)
    return np.clip(drawn, 3, longest).astype(int).tolist()


def make_folders(top: Path) -> dict[str, Path]:
    """Prepared folders by the lengths of their documents: a document of n + 1 tokens has n positions."""
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|end|>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = write_tokenizer(top / "tokenizer", words)
    lengths = {
        "whole": [LENGTH + 1] * 40,
        "tailed": tailed(700, 3.2, 1.6, 4 * LENGTH),
        "page": tailed(3000, 4.5, 1.3, 1025),
        "few": [LENGTH + 1] * 4,
        "long": [3 * LENGTH] * 10,
    }
    for name, each in lengths.items():
        lines = write_lines(top / f"{name}.jsonl", [{"text": " ".join(["a"] * (length - 1))} for length in each])
        prepare(top / name, tokenizer, lines)
    return {name: top / name for name in lengths}


def asked(capsys: pytest.CaptureFixture[str], line: str) -> Any:
    capsys.readouterr()
    assert main([*line.split(), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def documents_of(
    folder: Path, steps: int, packing: str = "documents", dp: int = 1
) -> list[tuple[tuple[int, ...], ...]]:
    """As a run reads them."""
    table = {
        "data": {"path": str(folder), "packing": packing}, "mesh": {"dp": dp},
        "train": {"sequence_length": LENGTH}, "schedule": {"microbatches": 4},
    }  # fmt: skip
    reading = open_corpus(build_config(table)).reading
    return [reading.documents(number) for number in range(1, steps + 1)]


def setting(**more: Any) -> Setting:
    """What `SIZES` says, as simulate has it."""
    core = named_accelerator("laptop-core")
    return Setting(SHAPES["tiny"], LENGTH, core, named_link(core.link), Keeping("selective", 4, device="cpu"), **more)
