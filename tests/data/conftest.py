"""A tokenizer of bytes for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
