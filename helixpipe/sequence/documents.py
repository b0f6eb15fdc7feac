"""Documents packed into one sequence: where each begins, so that none attends to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.model.tiles import Span


@dataclass(frozen=True)
class Row:
    """Sequences of the batch that are packed alike."""

    first: int
    stop: int | None
    spans: tuple[Span, ...]

    @property
    def batch(self) -> slice:
        return slice(self.first, self.stop)


@dataclass(frozen=True)
class Documents:
    """The documents of whole sequences, the same on every rank. A value: make it once a batch and hand it around."""

    rows: tuple[Row, ...]
    length: int

    @classmethod
    def of(cls, given: Documents | Tensor | Sequence[int], length: int, batch: int) -> Documents:
        """From cumulative lengths, `(0, 5, 12, 16)` or a 1-D tensor, of every sequence of the batch alike; or from a
        document id per token, integers [b, length]. Tokens attend to each other where their ids are equal.

        Raises ConfigError when that does not describe sequences of `length` tokens.
        """
        if isinstance(given, Documents):
            if given.length != length:
                raise ConfigError(
                    f"sequence.documents: made for {given.length} tokens, and the whole sequence has {length}; "
                    "describe the whole sequence, not a rank's shard"
                )
            if given.rows[-1].stop not in (None, batch):
                raise ConfigError(
                    f"sequence.documents: made for {given.rows[-1].stop} sequences, and there are {batch} here; "
                    "make them anew for each batch"
                )
            return given
        if isinstance(given, Tensor) and given.dim() == 2:
            if tuple(given.shape) != (batch, length):
                raise ConfigError(
                    f"sequence.documents: ids of shape {list(given.shape)} for {batch} whole sequences of {length} "
                    f"tokens; give [{batch}, {length}], the same on every rank"
                )
            return cls(_alike([_spans_of_ids(row) for row in given]), length)
        ends = [int(end) for end in given]
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or sorted(set(ends)) != ends:
            raise ConfigError(
                f"sequence.documents: cumulative lengths must rise from 0 to {length}, the whole sequence, and are "
                f"{_short(ends)}; ids per token are a tensor [b, {length}]"
            )
        spans = tuple(Span(a, b, i) for i, (a, b) in enumerate(pairwise(ends)))
        return cls((Row(0, None, spans),), length)


def _spans_of_ids(ids: Tensor) -> tuple[Span, ...]:
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    stops = counts.cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    return tuple(Span(a, b, int(i)) for a, b, i in zip(starts, stops, values.tolist(), strict=True))


def _alike(rows: list[tuple[Span, ...]]) -> tuple[Row, ...]:
    """Neighbouring sequences with the same documents as one row: fewer and larger kernel calls."""
    found: list[Row] = []
    for i, spans in enumerate(rows):
        if found and found[-1].spans == spans:
            found[-1] = Row(found[-1].first, i + 1, spans)
        else:
            found.append(Row(i, i + 1, spans))
    return tuple(found)


def _short(ends: list[int]) -> str:
    shown = ", ".join(map(str, ends[:6]))
    return f"({shown}, ...)" if len(ends) > 6 else f"({shown})"
