"""Data as a run opens it, and what it says of data that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from helixpipe.config_text import build_config
from helixpipe.errors import DataError
from helixpipe.train.data import Corpus, open_corpus


def corpus(path: Path, vocabulary: int = 256, **data: object) -> Corpus:
    table = {
        "data": {"path": str(path), "held_out": 0.25, **data},
        "model": {"vocabulary": vocabulary},
        "train": {"sequence_length": 8},
    }
    return open_corpus(build_config(table))


def refused(path: Path, vocabulary: int = 256, **data: object) -> str:
    with pytest.raises(DataError) as caught:
        corpus(path, vocabulary, **data)
    return str(caught.value)
