"""Objectives: what a model is asked of a batch of data, and what each answer weighs.

    next_token         the token that comes next: what data is read as
    masked             some tokens are chosen, most of them become the mask token, and each is asked for at its own place
    masked_diffusion   a share t of every sequence becomes the mask token, and losses weigh 1 / t (LLaDA, arXiv 2502.09992)

What is chosen is a function of seed, step and the sequence's place in the batch, and of a held-out window's number alone: any
layout of ranks sees the same, and so does a run that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helixpipe.config import Config
from helixpipe.parts.head import IGNORED
from helixpipe.train.data import Batch, Corpus
from helixpipe.train.mask_token import mask_token

LEAST_SHARE = 1e-3
"""t is drawn evenly from here to 1, as LLaDA's authors do: nearer to 0 one token's weight has no bound. Here it is 1000."""
MASK_SHARE = 0.15
MASK_REPLACE = (0.8, 0.1, 0.1)

# the last word of Philox's counter tells streams apart; that of 0 is the data's
_TRAINING, _HELD_OUT, _STRATA = 1, 2, 3


@dataclass(frozen=True)
class Objective:
    """What a run trains for. For `next_token` the rest is unused."""

    name: str = "next_token"
    seed: int = 0
    vocabulary: int = 0
    mask_token: int = 0
    share: float = MASK_SHARE
    """masked: of the tokens, how many are chosen."""
    replace: tuple[float, float, float] = MASK_REPLACE
    """masked: of those, how many become the mask token, become any word, and stay."""

    @staticmethod
    def of(config: Config) -> Objective:
        """Raises ConfigError where a mask token is needed and none is known."""
        train = config.train
        if train.objective == "next_token":
            return NEXT_TOKEN
        return Objective(
            train.objective,
            train.seed,
            config.shape().vocabulary,
            mask_token(config),
            MASK_SHARE if train.mask_share is None else train.mask_share,
            train.mask_replace or MASK_REPLACE,
        )

    def training(self, batch: Batch, step: int) -> Batch:
        """What the batch of a training step becomes."""
        if self.name == "next_token":
            return batch
        draws = [_stream(_TRAINING, row, self.seed, step) for row in range(len(batch.tokens))]
        # never 0
        shares = [LEAST_SHARE + (1 - LEAST_SHARE) * (1 - draw.random()) for draw in draws]
        return self._asked(batch, draws, shares)

    def held_out(self, corpus: Corpus, asked: int) -> Iterator[Batch]:
        """Batches of the corpus's held-out windows, masked alike in every run.

        Their t is stratified: of as many equal strata as there are windows each has one, whose middle it is.
        """
        windows, first = corpus.windows(asked), 0
        strata = _stream(_STRATA, 0).permutation(windows)
        for batch in corpus.evaluation(asked):
            if self.name == "next_token":
                yield batch
                continue
            rows = range(first, first + len(batch.tokens))
            first += len(batch.tokens)
            # what fills a batch up counts nothing, whatever its share
            shares = [LEAST_SHARE + (1 - LEAST_SHARE) * (strata[row % windows] + 0.5) / windows for row in rows]
            yield self._asked(batch, [_stream(_HELD_OUT, row) for row in rows], shares)

    def _asked(self, batch: Batch, draws: list[np.random.Generator], shares: list[float]) -> Batch:
        """`batch`: of targets that are its tokens, or -100; `shares`: t of each sequence."""
        size = batch.tokens.shape[1]
        counted = batch.targets != IGNORED
        if self.name == "masked":
            chosen = counted & np.stack([draw.random(size) < self.share for draw in draws])
            kinds = np.stack([draw.random(size) for draw in draws])
            words = np.stack([draw.integers(self.vocabulary, size=size) for draw in draws])
            masked, worded = chosen & (kinds < self.replace[0]), chosen & (kinds < self.replace[0] + self.replace[1])
            tokens = np.where(masked, self.mask_token, np.where(worded, words, batch.tokens))
            return batch._replace(tokens=tokens, targets=_only(chosen, batch.targets))
        chosen = counted & np.stack([draw.random(size) < t for draw, t in zip(draws, shares, strict=True)])
        weights = np.broadcast_to(1 / np.array(shares, np.float32)[:, None], chosen.shape)
        return batch._replace(
            tokens=np.where(chosen, self.mask_token, batch.tokens),
            targets=_only(chosen, batch.targets),
            weights=np.ascontiguousarray(weights),
            counted=counted,
        )


NEXT_TOKEN = Objective()


def _only(chosen: NDArray[np.bool_], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(chosen, targets, IGNORED)


def _stream(purpose: int, sequence: int, seed: int = 0, step: int = 0) -> np.random.Generator:
    """Random numbers that no other purpose, sequence, seed or step has."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, sequence, purpose]))
