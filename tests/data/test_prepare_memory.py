"""What is held in memory does not grow with the input. `benchmarks/prepare/memory.py` measures 10 GB."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest
from making import WORDS, write_lines

from helixpipe.cli import main
from helixpipe.data import records, shards


def peak_bytes(output: Path, tokenizer: Path, *arguments: object) -> int:
    """The most that Python and numpy hold at a time while a command runs."""
    tracemalloc.start()
    try:
        given = ["prepare", *map(str, arguments), "--tokenizer", str(tokenizer), "--output", str(output)]
        assert main([*given, "--workers", "1"]) == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["jsonl", "gz", "txt"])
def test_ten_times_the_input_takes_the_same_memory(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Units, batches and shards are made small, so that a small input has many; a packed file is one unit."""
    monkeypatch.setattr(records, "UNIT_BYTES", 2**17)
    monkeypatch.setattr(shards, "_BATCH_LETTERS", 2**12)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2**14)
    peaks = {}
    for lines in (100, 400, 4000):  # the first loads what is loaded once
        file = write_lines(tmp_path / f"{lines}.jsonl", [{"text": WORDS * 2}] * lines)
        options = []
        if kind == "gz":
            (tmp_path / f"{lines}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
            file = tmp_path / f"{lines}.jsonl.gz"
        if kind == "txt":
            file, options = file.rename(tmp_path / f"{lines}.log"), ["--split-lines"]
        size_bytes = len((WORDS * 2 * lines).encode())
        peaks[size_bytes] = peak_bytes(tmp_path / f"out{lines}", tokenizer, file, *options)
    (_, _), (small_bytes, small_peak), (large_bytes, large_peak) = peaks.items()
    assert large_bytes > 9e5
    assert large_peak - small_peak < 0.1 * (large_bytes - small_bytes)
