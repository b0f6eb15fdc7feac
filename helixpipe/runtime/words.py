"""Words: what ranks tell each other when a step has ended, in one exchange of numbers between their CPUs.

    rank 0   loss  buffers  norm  seconds  bytes  used?  more    ──┐
    rank 1   ...                                                   ├──► the same on every rank
    rank 2   ...                                                 ──┘

A rank reads its device once before that, when all that it has to tell is computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from helixpipe.predict.timeline import Totals
from helixpipe.runtime.gradient_norm import norm_of
from helixpipe.runtime.mesh import Place
from helixpipe.runtime.recorder import Summary

# flags in one number: a float64 has room for 53 bits
FLAGS = 32


class Word(NamedTuple):
    """One rank's, of a step."""

    loss: float
    """Its share."""
    buffers: float
    """What `Buffers.end` says."""
    divided: float = 0.0
    """The sum of squares of the gradients of parameters that tp divides, and of those that it does not."""
    whole: float = 0.0
    begun_s: float = 0.0
    ended_s: float = 0.0
    busy_s: float = 0.0
    peak_bytes: float = 0.0
    """A `Summary`, field by field."""
    more: float = 0.0
    """How many numbers of somebody else's stand at the end."""

    @property
    def summary(self) -> Summary:
        return Summary(self.begun_s, self.ended_s, self.busy_s, self.peak_bytes)


@dataclass(frozen=True)
class Told:
    """What all ranks told of a training step; the same on all ranks of a pipeline."""

    loss: float
    """The mean over the targets that count, in nats."""
    gradient_norm: float
    """Of all ranks' gradients, before they were clipped; NaN where nobody asked for it."""
    totals: Totals
    said: tuple[tuple[float, ...], ...] = ()
    """What else each rank said, in the order of the mesh's places."""


def told(rows: Sequence[Sequence[float]], places: Sequence[Place], line: Iterable[int], normed: bool) -> Told:
    """`rows`: a word, its flags and what else was said, of the ranks at `places`; `line`: those of one pipeline, by pipeline rank."""
    words = [Word(*row[: len(Word._fields)]) for row in rows]
    norm = norm_of([(word.divided, word.whole) for word in words], places) if normed else math.nan
    each = [words[rank].summary for rank in line]
    makespan_s = max(of.ended_s for of in each) - min(of.begun_s for of in each)
    totals = Totals(makespan_s, tuple(of.busy_s for of in each), tuple(int(of.peak_bytes) for of in each))
    said = tuple(tuple(row[len(row) - int(word.more) :]) for word, row in zip(words, rows, strict=True))
    return Told(math.fsum(word.loss for word in words), norm, totals, said)


def flags(of: Sequence[bool]) -> list[float]:
    """As numbers, FLAGS in each."""
    return [
        float(sum(1 << place for place, flag in enumerate(of[first : first + FLAGS]) if flag))
        for first in range(0, len(of), FLAGS)
    ]


def flagged(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Collection[str]:
    """Those of the names whose flag any rank has set. `rows`: each rank's word and the `flags` of these names behind it."""
    found: set[str] = set()
    for at in range(math.ceil(len(names) / FLAGS)):
        bits = 0
        for row in rows:
            bits |= int(row[len(Word._fields) + at])
        found.update(name for place, name in enumerate(names[at * FLAGS : (at + 1) * FLAGS]) if bits >> place & 1)
    return found


def numbers(*of: Tensor) -> list[float]:
    """The elements of some tensors in float64; their device is waited for once."""
    found: list[float] = torch.cat([each.double().flatten() for each in of]).tolist() if of else []
    return found
