"""Curves: seconds as a sum of sizes, each with a price that is not below 0, fitted to timings.

b sequences of s tokens each, behind z earlier tokens of the same sequences; what the kernels do with them:

    start    1          whatever the size                own      b s s    a token and those of its own segment
    tokens   b s        linear layers, norms             earlier  b s z    a token and those of earlier segments
    gathered b z        keys and values of the past, put side by side
    merged   b s, z>0   the two attentions become one

With a window, of s and z only what the window shows counts.

A fit makes the relative errors' squares least, so that a short segment counts as much as a long one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from helixpipe.parts.window import pairs, tail


class Size(NamedTuple):
    """How much a part has to do: sequences, tokens of each, and earlier tokens of each."""

    sequences: int
    length: int
    context: int = 0
    window: int = 0
    """How many tokens see each other: 0 is all."""

    @property
    def reached(self) -> int:
        """Earlier tokens that are seen."""
        return tail(self.context, self.window)

    @property
    def own_pairs(self) -> int:
        """Of the tokens themselves, as if each saw those after it too."""
        return pairs(0, self.length, self.length, False, self.window)

    @property
    def earlier_pairs(self) -> int:
        if not self.window:
            return self.length * self.context
        whole = self.context + self.length
        both = pairs(self.context, whole, whole, True, self.window)
        return both - pairs(0, self.length, self.length, True, self.window)


TERMS: dict[str, Callable[[Size], float]] = {
    "start": lambda at: 1.0,
    "tokens": lambda at: at.sequences * at.length,
    "own": lambda at: at.sequences * at.own_pairs,
    "earlier": lambda at: at.sequences * at.earlier_pairs,
    "gathered": lambda at: at.sequences * at.reached,
    "merged": lambda at: at.sequences * at.length * (at.reached > 0),
}
LINEAR = ("start", "tokens")
ATTENTION = tuple(TERMS)
SINGULAR = 1e-9
EXACT = 1e-12


@dataclass(frozen=True)
class Curve:
    """What each term costs, in seconds."""

    prices_s: dict[str, float]

    def seconds(self, at: Size) -> float:
        return math.fsum(price * TERMS[term](at) for term, price in self.prices_s.items())

    def worst_error(self, points: Sequence[tuple[Size, float]]) -> float:
        """The largest |curve / seconds - 1|."""
        return max(abs(self.seconds(at) / seconds - 1) for at, seconds in points)


def fit(points: Sequence[tuple[Size, float]], terms: Sequence[str]) -> Curve:
    """The curve of these terms, none with a price below 0, that is nearest to the points by relative error.

    Of so few terms all subsets can be tried: the best one whose least squares are all 0 or more is the answer.
    """
    rows = [[TERMS[term](at) / seconds for term in terms] for at, seconds in points]
    best, least = {terms[0]: 0.0}, math.inf
    for count in range(1, len(terms) + 1):
        for chosen in itertools.combinations(range(len(terms)), count):
            prices = _least_squares([[row[i] for i in chosen] for row in rows])
            if prices is None or min(prices) < 0:
                continue
            missed = math.fsum((sum(p * row[i] for p, i in zip(prices, chosen, strict=True)) - 1) ** 2 for row in rows)
            if missed + EXACT < least:  # a term that gains nothing is left out
                best, least = {terms[i]: p for p, i in zip(prices, chosen, strict=True)}, missed
    return Curve(best)


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """x with rows x = 1 as nearly as can be, by the normal equations; None when more than one x is."""
    columns = list(zip(*rows, strict=True))
    scales = [math.sqrt(math.fsum(value * value for value in column)) for column in columns]
    if min(scales) == 0:
        return None
    unit = [[value / scale for value in column] for column, scale in zip(columns, scales, strict=True)]
    matrix = [[math.fsum(map(float.__mul__, a, b)) for b in unit] + [math.fsum(a)] for a in unit]
    for i in range(len(matrix)):
        pivot = max(range(i, len(matrix)), key=lambda row: abs(matrix[row][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if abs(matrix[i][i]) < SINGULAR:
            return None
        for j, other in enumerate(matrix):
            if j != i:
                factor = other[i] / matrix[i][i]
                matrix[j] = [a - factor * b for a, b in zip(other, matrix[i], strict=True)]
    return [row[-1] / row[i] / scale for i, (row, scale) in enumerate(zip(matrix, scales, strict=True))]
