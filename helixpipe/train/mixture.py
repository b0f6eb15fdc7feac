"""A mixture: which source each sequence of a run is of, by weights, in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from helixpipe.train.order import drawn

# shares are counted in so many parts
_BITS = 48


class Mixture:
    """Sources by weight. After any number of sequences each source has had its share to within one for each source before it.

    The first source has every so-manieth sequence, the second every so-manieth of the others, and so on; the seed decides with
    which they begin.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        left = list(itertools.accumulate(reversed(weights)))[::-1]
        self._shares = [round(weight / rest * 2**_BITS) for weight, rest in zip(weights, left, strict=True)]
        self._shares[-1] = 2**_BITS
        self._phases = [drawn(seed, at) >> (64 - _BITS) for at in range(len(weights))]

    def before(self, sequence: int) -> list[int]:
        """Of each source, how many of the sequences before this one are its own."""
        found = []
        for share, phase in zip(self._shares, self._phases, strict=True):
            found.append((sequence * share + phase) >> _BITS)
            sequence -= found[-1]
        return found

    def source(self, sequence: int) -> tuple[int, int]:
        """The source of a sequence, and how many of that source come before it."""
        now, then = self.before(sequence), self.before(sequence + 1)
        source = next(at for at, (one, other) in enumerate(zip(now, then, strict=True)) if one != other)
        return source, now[source]
