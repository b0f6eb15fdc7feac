"""Data: sources of tokens, cut into training and held-out, and batches of them.

No token is held in memory and nothing is remembered: a batch is a function of the seed and the step (`reading`), read from
the files when it is asked for. So a resumed run needs no state of a loader.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helixpipe.config import Config
from helixpipe.errors import DataError
from helixpipe.parts.head import IGNORED
from helixpipe.parts.work import Lengths
from helixpipe.train.layouts import held_out_layout, open_sources, reading_of
from helixpipe.train.mixture import Mixture
from helixpipe.train.pieces import Tokens
from helixpipe.train.reading import Reading
from helixpipe.train.rows import Layout, Row, padding
from helixpipe.train.source import Source
from helixpipe.train.token_files import misfit
from helixpipe.train.usage import Epochs

# so many windows of so many tokens are what data is known by
_SAMPLES, _SAMPLE_TOKENS = 16, 256


class Batch(NamedTuple):
    """int64 [sequences, sequence_length] each; `targets` are the tokens that come next, or what an objective makes of them.

    `weights`, float32, and `counted`, bool, are an objective's: what losses weigh, and what they are divided by.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: Lengths = ()
    """Of each sequence the lengths of its documents, in order; () where attention goes across them."""
    weights: NDArray[np.float32] | None = None
    counted: NDArray[np.bool_] | None = None

    def filled(self, sequences: int) -> Batch:
        """As many sequences as asked for: those that are added count nothing."""
        added = sequences - len(self.tokens)
        more = ((0, added), (0, 0))
        empty = (tuple(padding(self.tokens.shape[1])),) * added if self.documents else ()
        return Batch(
            np.pad(self.tokens, more), np.pad(self.targets, more, constant_values=IGNORED), self.documents + empty
        )


@dataclass(frozen=True)
class Corpus:
    """The sources of a run, which rows its steps have, and what is held out of each."""

    sources: tuple[Source, ...]
    reading: Reading
    held_out_layouts: tuple[Layout, ...]
    vocabulary: int
    remarks: tuple[str, ...] = ()
    """What a user should know of the data but need not mend, a line each."""
    ahead: int = 1
    """How far from a token its target is: 1 the next, 0 itself, of which an objective chooses."""

    @functools.cached_property
    def training(self) -> Tokens:
        """The training tokens of all sources, one after another."""
        return Tokens([piece for source in self.sources for piece in source.training.pieces])

    @functools.cached_property
    def held_out(self) -> Tokens:
        """The held-out tokens of all sources, one after another."""
        return Tokens([piece for source in self.sources for piece in source.held_out.pieces])

    @property
    def batch_size(self) -> int:
        return self.reading.rows_a_step

    def fingerprint(self) -> tuple[int, int, int]:
        """Tokens to train on, tokens held out, and a checksum of windows all over the former: what data this is."""
        checksum = 0
        for source in self.sources:
            checksum = _checksum(source, checksum)
        return len(self.training), len(self.held_out), checksum

    def batch(self, step: int) -> Batch:
        """The batch of a training step, from 1 on: decided by seed and step alone."""
        return self.read(self.reading.step(step))

    def epochs(self, steps: int) -> Epochs:
        """How often each source has been read after so many steps."""
        return tuple(zip((source.name for source in self.sources), self.reading.epochs(steps), strict=True))

    def described(self) -> str:
        """A line on what is read, and how."""
        total = sum(self.reading.weights)
        shares = [f" ({weight / total:.1%})" if len(self.sources) > 1 else "" for weight in self.reading.weights]
        told = [
            f"{source.name}{share}: {layout.told()}"
            for source, share, layout in zip(self.sources, shares, self.reading.layouts, strict=True)
        ]
        return f"reads {'; '.join([*told, *self.reading.told()])}"

    def windows(self, asked: int) -> int:
        """How many sequences an evaluation of so many has: no more than give every held-out token as a target once."""
        return sum(self._evaluated(asked))

    def evaluation(self, asked: int) -> Iterator[Batch]:
        """Held-out sequences, evenly spread: the same ones every time, whatever a batch is. The last batch is filled up."""
        rows = [
            row
            for source, (layout, count) in enumerate(zip(self.held_out_layouts, self._evaluated(asked), strict=True))
            for row in layout.spread(count, source)
        ]
        for first in range(0, len(rows), self.batch_size):
            yield self.read(rows[first : first + self.batch_size], held_out=True).filled(self.batch_size)

    def _evaluated(self, asked: int) -> list[int]:
        """Of each source, how many of so many held-out sequences are its own: by its weight, as far as it has them."""
        wanted = Mixture(self.reading.weights, 0).before(asked)
        return [min(count, len(layout)) for count, layout in zip(wanted, self.held_out_layouts, strict=True)]

    def read(self, rows: Sequence[Row], held_out: bool = False) -> Batch:
        """The tokens of rows."""
        length = self.reading.sequence_length
        tokens, targets = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), IGNORED)
        for at, source in enumerate(self.sources):
            mine = [number for number, row in enumerate(rows) if row.source == at]
            run = source.held_out if held_out else source.training
            for number, (read, next_ones) in zip(mine, self._read([rows[each] for each in mine], run), strict=True):
                tokens[number, : len(read)], targets[number, : len(read)] = read, next_ones
        documents = tuple(row.documents for row in rows)
        return Batch(tokens, targets, documents if any(documents) else ())

    def _read(self, rows: Sequence[Row], run: Tokens) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Of each row the tokens that it reads and the targets, without padding."""
        starts = [start for row in rows for start in row.starts.tolist()]
        counts = [count for row in rows for count in row.counts.tolist()]
        pieces = run.gather(starts, [count + 1 for count in counts])
        for piece in pieces:
            self._check(piece)
        counted = run.gather_counted([start + self.ahead for start in starts], counts) if run.masked() else None
        first = 0
        for row in rows:
            mine = slice(first, first := first + len(row.starts))
            targets = np.concatenate([piece[self.ahead :][: len(piece) - 1] for piece in pieces[mine]])
            if self.ahead:
                targets[row.crossing] = IGNORED
            if counted is not None:
                targets[~np.concatenate(counted[mine])] = IGNORED
            yield np.concatenate([piece[:-1] for piece in pieces[mine]]), targets

    def _check(self, tokens: NDArray[np.int64]) -> None:
        at = misfit(tokens, self.vocabulary)
        if at is not None:
            raise DataError(
                f"data.path: token {tokens.flat[at]} does not fit a vocabulary of {self.vocabulary}; "
                "raise model.vocabulary or prepare the data with its tokenizer"
            )


def open_corpus(config: Config) -> Corpus:
    """The corpus of a config; raises DataError for data that cannot be trained on."""
    data, train, shape = config.data, config.train, config.shape()
    sources = open_sources(data, shape.vocabulary)
    reading = reading_of(
        sources,
        data,
        shape,
        train.sequence_length,
        microbatches=config.schedule.microbatches,
        microbatch_size=train.microbatch_size,
        replicas=config.mesh.dp,
        seed=train.seed,
    )
    held_out = tuple(held_out_layout(source, data, train.sequence_length) for source in sources)
    remarks = tuple(dict.fromkeys(remark for source in sources for remark in source.remarks))
    ahead = 1 if train.objective == "next_token" else 0
    return Corpus(sources, reading, held_out, shape.vocabulary, remarks, ahead)


def _checksum(source: Source, before: int) -> int:
    """Of windows all over the training tokens, and of where documents end."""
    tokens = source.training
    count = min(len(tokens), _SAMPLE_TOKENS)
    room = len(tokens) - count
    starts = [room * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    found = zlib.crc32(np.stack([tokens.read(start, count) for start in starts]).tobytes(), before)
    if tokens.masked():
        masks = np.stack([tokens.counted(start, count) for start in starts])
        found = zlib.crc32(masks.tobytes(), found)
    for ends in (source.training_ends, source.held_out_ends):
        found = found if ends is None else zlib.crc32(ends.astype("<i8").tobytes(), found)
    return found
