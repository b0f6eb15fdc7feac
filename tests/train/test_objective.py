"""Objectives: which tokens are masked, what stands in their place, and what a loss weighs; a function of seed, step and place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import plain_logits
from values import initial_values

import helixpipe as hp
from helixpipe.config import Config, RuntimeConfig, ScheduleConfig
from helixpipe.config_text import build_config
from helixpipe.train.data import Batch, Corpus, open_corpus
from helixpipe.train.held_out import held_out_losses, tensors
from helixpipe.train.objective import Objective
from helixpipe.train.pieces import Piece, Tokens
from helixpipe.train.reading import Reading
from helixpipe.train.source import Source
from helixpipe.train.start import make_pipeline
from helixpipe.train.windows import Windows

VOCABULARY, MASK = 300, 299


def config_of(path: Path, objective: str, length: int = 50, size: int = 8, **train: Any) -> Config:
    return build_config({
        "model": {"vocabulary": VOCABULARY, "causal": False},
        "data": {"path": str(path), "held_out": 0.25},
        "schedule": {"ranks": 1, "microbatches": 2},
        "train": {
            "objective": objective, "mask_token": MASK, "sequence_length": length, "microbatch_size": size,
            "evaluate_sequences": 12, **train,
        },
    })  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 of them, none the mask token."""
    path = tmp_path_factory.mktemp("objective") / "tokens.npy"
    np.save(path, np.random.default_rng(7).integers(0, MASK, 20_000).astype(np.uint16))
    return path


def both(config: Config) -> tuple[Corpus, Objective]:
    return open_corpus(config), Objective.of(config)


def asked_of(objective: Objective, corpus: Corpus, step: int) -> Batch:
    return objective.training(corpus.batch(step), step)


def joined(batches: Sequence[Batch]) -> Batch:
    """Of batches without documents."""
    fields = ("tokens", "targets", "weights", "counted")
    found = {name: [getattr(each, name) for each in batches] for name in fields}
    return Batch(**{name: np.concatenate(each) for name, each in found.items() if each[0] is not None})


def many(config: Config, steps: int = 40) -> tuple[Batch, Batch]:
    """Batches of data and what is asked of them, one after another."""
    corpus, objective = both(config)
    pairs = [(corpus.batch(step), asked_of(objective, corpus, step)) for step in range(1, steps + 1)]
    data, asked = (joined(batches) for batches in zip(*pairs, strict=True))
    return data, asked


def test_next_token_hands_on_what_the_data_gives(tokens: Path) -> None:
    config = build_config({"data": {"path": str(tokens)}, "model": {"vocabulary": VOCABULARY}})
    corpus, objective = both(config)
    batch = asked_of(objective, corpus, 3)
    assert (batch.tokens == corpus.batch(3).tokens).all()
    assert (batch.targets == corpus.batch(3).targets).all()
    assert batch.weights is batch.counted is None
    pairs = zip(objective.held_out(corpus, 5), corpus.evaluation(5), strict=True)
    assert all((one.targets == other.targets).all() for one, other in pairs)


@pytest.mark.parametrize(("share", "replace"), [(None, None), (0.4, [0.5, 0.3, 0.2]), (1.0, [0.0, 0.0, 1.0])])
def test_masked_chooses_and_replaces_in_the_shares_asked_for(
    tokens: Path, share: float | None, replace: list[float] | None
) -> None:
    given = {key: value for key, value in (("mask_share", share), ("mask_replace", replace)) if value is not None}
    data, asked = many(config_of(tokens, "masked", **given))
    chosen = asked.targets != -100
    assert (asked.targets[chosen] == data.tokens[chosen]).all(), "what is asked for stood there"
    assert (asked.tokens[~chosen] == data.tokens[~chosen]).all(), "all else stays"
    assert asked.weights is asked.counted is None
    count, size = int(chosen.sum()), chosen.size
    assert abs(count / size - (share or 0.15)) < 5 * (0.25 / size) ** 0.5
    to_mask, to_word, stay = replace or (0.8, 0.1, 0.1)
    masked = asked.tokens[chosen] == MASK
    same = asked.tokens[chosen] == data.tokens[chosen]
    error = 5 * (0.25 / count) ** 0.5
    assert abs(masked.mean() - to_mask) < error
    assert abs(same.mean() - stay) < error
    words = asked.tokens[chosen][~masked & ~same]
    assert abs(len(words) / count - to_word) < error
    if len(words):
        assert abs(words.mean() - VOCABULARY / 2) < 5 * VOCABULARY / 12**0.5 / len(words) ** 0.5, "any word"


def test_diffusion_masks_a_share_of_each_sequence_that_its_weight_tells(tokens: Path) -> None:
    data, asked = many(config_of(tokens, "masked_diffusion", length=200))
    assert asked.weights is not None
    assert asked.counted is not None
    chosen = asked.targets != -100
    assert (asked.targets[chosen] == data.tokens[chosen]).all()
    assert (asked.tokens == np.where(chosen, MASK, data.tokens)).all()
    assert asked.counted.all(), "divided by all tokens"
    assert asked.weights.dtype == np.float32
    assert (asked.weights == asked.weights[:, :1]).all()
    t = 1 / asked.weights[:, 0].astype(np.float64)
    assert 1e-3 <= t.min() < 0.02
    assert 0.98 < t.max() <= 1
    assert abs(t.mean() - 0.5) < 5 / 12**0.5 / len(t) ** 0.5
    assert abs((t < 0.25).mean() - 0.25) < 5 * (0.1875 / len(t)) ** 0.5
    assert (abs(chosen.mean(1) - t) < 6 * (t * (1 - t) / 200) ** 0.5 + 1e-9).all()
    # the estimate of the bound is unbiased: a token weighs 1 in the mean
    weigh = (chosen * asked.weights).mean(1)
    assert abs(weigh.mean() - 1) < 5 * weigh.std() / len(t) ** 0.5


@pytest.mark.parametrize("objective", ["masked", "masked_diffusion"])
def test_masks_are_a_function_of_seed_step_and_place(tokens: Path, objective: str) -> None:
    """A batch of twice the size begins with the same masks; another seed, step or place has others."""
    corpus, asking = both(config_of(tokens, objective))
    once, again = asked_of(asking, corpus, 7), asked_of(both(config_of(tokens, objective))[1], corpus, 7)
    assert all(np.array_equal(one, other) for one, other in zip(once, again, strict=True))  # type: ignore[arg-type]
    large, _ = both(config_of(tokens, objective, size=16))
    chosen = once.targets != -100
    assert ((asked_of(asking, large, 7).targets != -100)[: len(chosen)] == chosen).all()
    assert len({row.tobytes() for row in chosen}) == len(chosen)
    for other in (asked_of(asking, corpus, 8), asked_of(both(config_of(tokens, objective, seed=1))[1], corpus, 7)):
        assert ((other.targets != -100) != chosen).any(1).all()


@pytest.mark.parametrize("objective", ["masked", "masked_diffusion"])
def test_held_out_masks_are_the_same_whatever_a_batch_and_a_seed_are(tokens: Path, objective: str) -> None:
    found = []
    for size, seed in ((1, 0), (3, 0), (8, 5)):
        corpus, asking = both(config_of(tokens, objective, size=size, seed=seed))
        rows = joined(list(asking.held_out(corpus, 12)))
        assert (rows.targets[12:] == -100).all(), "what fills a batch up is not asked for"
        if objective == "masked_diffusion":
            assert rows.counted[:12].all()
            assert not rows.counted[12:].any()
        found.append([array[:12].tolist() for array in rows if isinstance(array, np.ndarray)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("asked", [1, 5, 12])
def test_held_out_shares_are_stratified(tokens: Path, asked: int) -> None:
    corpus, asking = both(config_of(tokens, "masked_diffusion"))
    weights = np.concatenate([batch.weights[:, 0] for batch in asking.held_out(corpus, asked)])[:asked]
    strata = np.sort((1 / weights.astype(np.float64) - 1e-3) / 0.999)
    assert strata == pytest.approx((np.arange(asked) + 0.5) / asked, abs=1e-6)
    if asked == 12:
        assert (np.diff(1 / weights) < 0).any(), "not in the order of the text"


@pytest.mark.parametrize("objective", ["masked", "masked_diffusion"])
def test_what_does_not_count_is_never_chosen(tmp_path: Path, objective: str) -> None:
    """A loss mask: a token that does not count stays as it is, the first of a window as well."""
    ids = np.arange(4000, dtype=np.uint16)
    counts = np.arange(4000) % 3 == 0
    ids.tofile(tmp_path / "ids")
    np.packbits(counts, bitorder="little").tofile(tmp_path / "mask")
    pieces = Tokens([Piece(str(tmp_path / "ids"), "uint16", 0, 4000, str(tmp_path / "mask"))])
    windows = Windows(4000, 50)
    source = Source("a", pieces, pieces, None, None, "ids", ())
    corpus = Corpus((source,), Reading((windows,), (1.0,), 50, 64), (windows,), 4001, ahead=0)
    asking = Objective(objective, 0, 4001, 4000, 0.9)
    data = dataclasses.replace(corpus, ahead=1).batch(1).tokens
    held_out = np.concatenate([batch.targets for batch in asking.held_out(corpus, 64)])
    asked = asked_of(asking, corpus, 1)
    chosen = asked.targets != -100
    may = counts[data]  # a token is its own place in the text
    assert not (chosen & ~may).any()
    assert (chosen & may).any(0).sum() > 45, "any position may be, the first and the last too"
    assert (asked.tokens[~may] == data[~may]).all()
    assert (held_out != -100).any()
    if asked.counted is not None:
        assert (asked.counted == may).all()


def plain_loss(shape: hp.ModelShape, weights: dict[str, torch.Tensor], data: Batch, asked: Batch) -> float:
    """LLaDA's: of each sequence, 1 / t times the sum of what masked tokens lose, over its length; the mean of them."""
    losses = []
    for row, (tokens, corrupted) in enumerate(zip(data.tokens, asked.tokens, strict=True)):
        logits = plain_logits(shape, weights, torch.from_numpy(corrupted[None]))[0]
        t = 1 / float(asked.weights[row, 0])
        masked = [i for i in range(len(tokens)) if corrupted[i] == MASK]
        lost = sum(float(logits[i].logsumexp(0) - logits[i, tokens[i]]) for i in masked)
        losses.append(lost / t / len(tokens))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("schedule", [{"family": "1f1b"}, {"family": "helix", "folds": 2}])
def test_diffusion_s_loss_is_that_of_a_plain_implementation(tokens: Path, schedule: dict[str, Any]) -> None:
    """In training and on held-out windows; these with a last batch that is filled up."""
    config = dataclasses.replace(
        config_of(tokens, "masked_diffusion", length=20, size=4),
        runtime=RuntimeConfig(dtype="float64", head_chunk=7),
        schedule=ScheduleConfig(ranks=1, microbatches=2, **schedule),
    )
    (corpus, asking), shape = both(config), config.shape()
    weights = {name: value.double() for name, value in initial_values(shape).items()}
    pipeline = make_pipeline(config, "cpu", None)
    asked = asked_of(asking, corpus, 1)
    expected = plain_loss(shape, weights, corpus.batch(1), asked)
    assert pipeline.evaluate(**tensors(asked)) == pytest.approx(expected, abs=1e-12)
    assert pipeline.step(**tensors(asked)) == pytest.approx(expected, abs=1e-12)
    losses = held_out_losses(pipeline, corpus, 10, asking)
    pipeline.close()
    pairs = list(zip(corpus.evaluation(10), asking.held_out(corpus, 10), strict=True))
    data, questions = (joined(each) for each in zip(*pairs, strict=True))
    data, questions = (Batch(each.tokens[:10], each.targets[:10], (), each.weights) for each in (data, questions))
    questions = questions._replace(weights=None if questions.weights is None else questions.weights[:10])
    assert losses.mean == pytest.approx(plain_loss(shape, weights, data, questions), abs=1e-12)
    assert losses.counted == 200
    assert [bucket.counted for bucket in losses.by_position] == [10, 10, 20, 40, 80, 40]
    assert sum(bucket.total for bucket in losses.by_position) == pytest.approx(losses.total, rel=1e-12)
