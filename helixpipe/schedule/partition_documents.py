"""Where to cut sequences of documents so that segments cost the same.

    work of a token        linear + pair * (keys it sees)         keys seen start anew with each document, and
                                                                  grow no more once they fill a window
    |      /|    __        So what one more token costs is a line between turning points: where a document begins, ends
    |    /  |  /           or fills a window. Rows of a micro-batch are cut at the same places, and their work adds up.
    |  /    |/             A boundary solves a quadratic in the piece where its share of the whole is reached.
    +------------ position

Boundaries may be anywhere, inside documents too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence


def equal_work(
    documents: Sequence[Sequence[int]], segments: int, linear: float, pairs: Mapping[int, float]
) -> list[float]:
    """The boundaries between segments that cost the same. `documents`: of each row the lengths of its documents.

    A token costs `linear`, and of every window (0: none) a pair of it and a key that it sees what `pairs` says.
    """
    pieces = _pieces(documents, linear, pairs)
    costs = [cost * length + slope * length**2 / 2 for _, length, cost, slope in pieces]
    whole = math.fsum(costs)
    bounds: list[float] = []
    before = 0.0
    for (start, length, cost, slope), piece in zip(pieces, costs, strict=True):
        while len(bounds) + 1 < segments and before + piece >= (share := whole * (len(bounds) + 1) / segments):
            need = share - before
            # the usual formula, written so that it holds without a slope and does not subtract equals
            root = cost + math.sqrt(cost**2 + 2 * slope * need)
            bounds.append(start + (min(2 * need / root, length) if root else 0.0))
        before += piece
    return bounds + [float(sum(documents[0]))] * (segments - 1 - len(bounds))  # what rounding left


def _pieces(
    documents: Sequence[Sequence[int]], linear: float, pairs: Mapping[int, float]
) -> list[tuple[int, int, float, float]]:
    """(start, length, cost of a token at its start, what each token costs more than the one before)."""
    turns: dict[int, tuple[float, float]] = {0: (linear * len(documents), 0.0)}

    def turn(at: int, cost: float, slope: float) -> None:
        before = turns.get(at, (0.0, 0.0))
        turns[at] = before[0] + cost, before[1] + slope

    for lengths in documents:
        begin = 0
        for length in lengths:
            for window, pair in pairs.items():
                grows = min(length, window or length)
                turn(begin, 0.0, pair)
                turn(begin + grows, 0.0, -pair)
                turn(begin + length, -pair * grows, 0.0)
            begin += length
    places, found = sorted(turns), []
    cost = slope = 0.0
    for place, end in itertools.pairwise(places):
        cost, slope = max(cost + turns[place][0], 0.0), max(slope + turns[place][1], 0.0)
        found.append((place, end - place, cost, slope))
        cost += slope * (end - place)
    return found
