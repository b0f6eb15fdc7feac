"""Held-out losses are a function of weights and data alone: no schedule, mesh or batch moves them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import plain_logits
from ranks import Ranks
from values import initial_values

import helixpipe as hp
from helixpipe.config import Config
from helixpipe.config_text import build_config
from helixpipe.runtime.losses import Losses
from helixpipe.train.data import open_corpus
from helixpipe.train.held_out import held_out_losses
from helixpipe.train.start import make_pipeline

LENGTH, ASKED = 32, 11
MODEL = {"layers": 4, "hidden": 16, "heads": 4, "ffn": 24, "kv_heads": 2, "vocabulary": 256}
TEXT = np.random.default_rng(7).integers(0, 256, 4001, np.uint8)


@dataclass(frozen=True)
class Case:
    """Keys of sections, as in a config."""

    schedule: dict[str, Any]
    size: int = 1
    mesh: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)

    def config(self, path: str) -> Config:
        return build_config({
            "model": MODEL,
            "data": {"path": path, "held_out": 0.25},
            "train": {"sequence_length": LENGTH, "microbatch_size": self.size, "evaluate_sequences": ASKED},
            "schedule": {"microbatches": 2, "segment_multiple": 8, **self.schedule},
            "mesh": self.mesh,
            "runtime": {"dtype": "float64", **self.runtime},
        })  # fmt: skip

    def __str__(self) -> str:
        told = {**self.schedule, **self.mesh, **self.runtime}
        return f"{'-'.join(map(str, told.values()))}-size{self.size}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("held_out") / "text.bin"
    TEXT.astype(np.uint16).tofile(path)
    return str(path)


@functools.cache
def oracle() -> tuple[float, list[tuple[float, int]]]:
    """Total, and total and count by position, of windows spread evenly over the last quarter: torch's alone."""
    held_out = TEXT[-1000:].astype(np.int64)
    starts = [(1000 - LENGTH - 1) * i // (ASKED - 1) for i in range(ASKED)]
    rows = torch.from_numpy(np.stack([held_out[start : start + LENGTH + 1] for start in starts]))
    shape = hp.named_shape("tiny", **MODEL)
    weights = {name: value.double() for name, value in initial_values(shape).items()}
    logits = plain_logits(shape, weights, rows[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(ASKED, LENGTH)
    by_bit_length: dict[int, list[float]] = {}
    for position in range(LENGTH):
        by_bit_length.setdefault(position.bit_length(), []).extend(losses[:, position].tolist())
    return float(losses.sum()), [(sum(each), len(each)) for _, each in sorted(by_bit_length.items())]


def evaluated(case: Case, path: str) -> Losses:
    """On a rank."""
    config = case.config(path)
    corpus, pipeline = open_corpus(config), make_pipeline(config, "cpu", None)
    told: list[int] = []
    losses = held_out_losses(pipeline, corpus, ASKED, tell=told.append)
    pipeline.close()
    assert told == [*range(corpus.batch_size, ASKED, corpus.batch_size), ASKED]
    return losses


def holds(found: Losses, error: float = 1e-12) -> None:
    total, by_position = oracle()
    assert found.total == pytest.approx(total, rel=error)
    assert found.counted == ASKED * LENGTH
    assert found.mean == pytest.approx(total / (ASKED * LENGTH), rel=error)
    assert [(b.first, b.stop) for b in found.by_position] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert [b.counted for b in found.by_position] == [count for _, count in by_position]
    assert [b.total for b in found.by_position] == pytest.approx([total for total, _ in by_position], rel=error)
    assert found.without == ""


ALONE = [
    Case({"family": "1f1b", "microbatches": 2}, 1),
    Case({"family": "1f1b", "microbatches": 4}, 2),
    Case({"family": "gpipe", "microbatches": 2}, 3, runtime={"head_chunk": 5}),
    Case({"family": "gpipe", "microbatches": 7}, 2),
    Case({"family": "seq1f1b", "segments": 4, "microbatches": 3}, 1),
    Case({"family": "seq1f1b", "segments": 2, "microbatches": 2}, 3, runtime={"head_chunk": 7}),
    Case({"family": "helix", "folds": 1, "microbatches": 2}, 2, runtime={"recompute": "full"}),
]


@pytest.mark.parametrize("case", [Case(c.schedule | {"ranks": 1}, c.size, c.mesh, c.runtime) for c in ALONE], ids=str)
def test_one_rank_gives_what_plain_torch_does(case: Case, text: str) -> None:
    holds(evaluated(case, text))


RING = ("zigzag", "striped", "plain")
FOUR = [
    Case({"family": "1f1b", "ranks": 4}, 3),
    Case({"family": "gpipe", "ranks": 4, "microbatches": 5}),
    Case({"family": "seq1f1b", "ranks": 4, "segments": 4}, 2, runtime={"head_chunk": 3}),
    Case({"family": "helix", "ranks": 4, "folds": 1, "microbatches": 4, "travel": "qkv"}),
    Case({"family": "1f1b", "ranks": 2}, 2, {"dp": 2}),
    Case({"family": "helix", "ranks": 2, "folds": 2, "microbatches": 4}, 1, {"dp": 2}),
    *(Case({"family": "1f1b", "ranks": 2}, 1, {"cp": 2, "layout": layout}) for layout in RING),
    Case({"family": "seq1f1b", "ranks": 2, "segments": 4}, 2, {"cp": 2}, {"head_chunk": 4}),
    Case({"family": "seq1f1b", "ranks": 2, "segments": 2}, 1, {"cp": 2, "context_method": "ulysses"}),
    Case({"family": "1f1b", "ranks": 2}, 3, {"tp": 2}),
    Case({"family": "helix", "ranks": 1, "folds": 2, "microbatches": 2}, 1, {"cp": 2, "tp": 2}),
    Case({"family": "seq1f1b", "ranks": 1, "segments": 2}, 1, {"dp": 2, "tp": 2}, {"head_chunk": 6}),
]  # fmt: skip


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_any_layout_of_four_ranks_gives_the_same(four_ranks: Ranks, case: Case, text: str) -> None:
    results = four_ranks.run(evaluated, case, text)
    assert results == [results[0]] * 4
    holds(results[0])


@pytest.mark.parametrize("size", [1, 3])
def test_float32_is_as_near_as_its_rounding(size: int, text: str) -> None:
    case = Case({"family": "1f1b", "ranks": 1}, size, runtime={"dtype": "float32"})
    holds(evaluated(case, text), 1e-6)


def test_windows_are_the_data_s_the_length_s_and_the_number_s_alone(text: str) -> None:
    found = []
    for schedule, size, dp in (({}, 1, 1), ({"microbatches": 8}, 3, 2), ({"microbatches": 2}, 5, 1)):
        corpus = open_corpus(Case({"family": "1f1b", **schedule}, size, {"dp": dp}).config(text))
        batches = list(corpus.evaluation(ASKED))
        assert all(batch.tokens.shape == (corpus.batch_size, LENGTH) for batch in batches)
        tokens, targets = (np.concatenate([batch[at] for batch in batches]) for at in range(2))
        assert (targets[ASKED:] == -100).all()
        assert (targets[:ASKED] >= 0).all()
        found.append((tokens[:ASKED].tolist(), targets[:ASKED].tolist()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("held_out", "windows"), [(8, 0), (9, 1), (16, 1), (17, 2), (24, 2), (25, 3), (80, 9), (81, 10), (2000, 10)]
)
def test_windows_never_count_a_token_twice(tmp_path: Path, held_out: int, windows: int) -> None:
    np.arange(2000 + held_out, dtype=np.uint16).tofile(tmp_path / "a.bin")
    table: dict[str, Any] = {
        "model": {"vocabulary": 5000}, "train": {"sequence_length": 8}, "schedule": {"microbatches": 12},
        "data": {"path": str(tmp_path / "a.bin"), "held_out": held_out / (2000 + held_out)},
    }  # fmt: skip
    if not windows:
        with pytest.raises(hp.DataError, match="leaves 8 tokens held out, fewer than a sequence and its next token"):
            open_corpus(build_config(table))
        return
    corpus = open_corpus(build_config(table))
    assert len(corpus.held_out) == held_out
    assert corpus.windows(10) == windows
    (batch,) = corpus.evaluation(10)
    targets = batch.targets[:windows].ravel()
    assert len(set(targets.tolist())) == 8 * windows
    assert (batch.targets[windows:] == -100).all()
    assert batch.tokens[0, 0] == 2000
    if windows > 1:
        assert targets[-1] == 1999 + held_out, "the last token is in the last window"
