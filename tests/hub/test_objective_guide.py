"""The guide's page on objectives: its commands are understood, and its Python runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from saved import WORDS, saved

from helixpipe.config_text import parse_arguments
from helixpipe.train.job import prepare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guide/objectives.md").read_text(encoding="utf-8")


def test_its_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small ModernBERT of transformers, whose tokenizer names its mask token."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    saved(tmp_path / "modernbert", "modernbert")
    (tmp_path / "modernbert/tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 4, "content": "[MASK]"}]}))
    (tmp_path / "modernbert/tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens/a.npy", np.arange(100_000, dtype=np.uint16) % WORDS)
    lines = [shlex.split(line) for line in re.findall(r"^    helixpipe (.*)$", PAGE, re.MULTILINE)]
    found = [prepare(words, lambda line: None).config for command, *words in lines if command == "train"]
    assert [config.train.objective for config in found] == ["masked_diffusion", "masked", "masked"]
    assert [config.train.mask_token for config in found] == [255, 255, 4]
    (evaluate,) = [words for command, *words in lines if command == "evaluate"]
    assert parse_arguments(evaluate).overrides["train"] == {"evaluate_sequences": 256}


def test_its_python_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert 4 < float(done.stdout) < 7, "of 256 tokens nothing is known: log 256, and as many as were masked"
