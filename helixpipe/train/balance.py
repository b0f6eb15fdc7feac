"""Balance: what documents cost a model, and rows put together so that those of a step cost the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Work


class LengthWork:
    """FLOPs of a document in all layers of a model, forward and backward, by its length: each length is asked for once.

    A part says what it takes: matrices by token, attention by pairs of tokens (causal: half of the square; a window: what
    it shows). Embedding and head stand on single ranks, by token too, and are left out.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        parts = shape.chain()[1:-1]
        alike = Counter(map(shape.alike, parts))
        self._parts = [(part, alike[key]) for key, part in {shape.alike(part): part for part in parts}.items()]
        self._known: dict[int, float] = {}

    def of(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """FLOPs of documents of these lengths (tokens)."""
        distinct, which = np.unique(lengths, return_inverse=True)
        return np.array([self._one(length) for length in distinct.tolist()], np.float64)[which]

    def _one(self, length: int) -> float:
        if length not in self._known:
            self._known[length] = sum(count * self._flops(part, length) for part, count in self._parts)
        return self._known[length]

    def _flops(self, part: Part, length: int) -> float:
        work, about = Work(self.shape, Batch(1, (length,))), self.shape.about(part)
        return about.forward_flops(part, work) + about.backward_flops(part, work)


def dealt(work: NDArray[np.float64], groups: int) -> list[list[int]]:
    """Rows in groups of as many that cost as much as can be: the dearest first, each to the cheapest group with room.

    `work`: of each row. A group's rows are in their own order.
    """
    room = len(work) // groups
    totals, found = [0.0] * groups, [list[int]() for _ in range(groups)]
    for row in np.argsort(-work, kind="stable").tolist():
        group = min((at for at in range(groups) if len(found[at]) < room), key=lambda at: totals[at])
        totals[group] += float(work[row])
        found[group].append(row)
    return [sorted(rows) for rows in found]
