"""Order: a seeded permutation of any number of things that is evaluated one by one, so that no table of it is held."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_WORD = 2**64 - 1
# splitmix64 (Steele, Lea and Flood, 2014): the golden ratio, and its two multipliers
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def drawn(*words: int) -> int:
    """64 bits that these numbers decide, the same on every machine."""
    found = 0
    for word in (*words, len(words)):
        found = _mixed((found + (word & _WORD) + _STEP) & _WORD)
    return found


class Permutation:
    """A permutation of 0..size-1 that `words` decide: a Feistel network over the next power of four.

    What it takes beyond the size is permuted again until it is within (cycle walking): four times on average, at most.
    """

    def __init__(self, size: int, *words: int) -> None:
        self.size = size
        self._half = max((size - 1).bit_length() + 1, 2) // 2
        self._keys = [drawn(*words, each) for each in range(_ROUNDS)]

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at these places."""
        found = places.astype(np.uint64)
        walking = np.arange(len(found))
        while len(walking):
            found[walking] = self._network(found[walking])
            walking = walking[found[walking] >= self.size]
        return found.astype(np.int64)

    def at(self, place: int) -> int:
        """What stands at a place."""
        half, low = self._half, (1 << self._half) - 1
        while True:
            left, right = place >> half, place & low
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & low)
            place = left << half | right
            if place < self.size:
                return place

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half, low = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & low
        for key in self._keys:
            left, right = right, left ^ (_mixed_all(right ^ np.uint64(key)) & low)
        return (left << half) | right


def _mixed(value: int) -> int:
    value = ((value ^ value >> 30) * _FIRST) & _WORD
    value = ((value ^ value >> 27) * _SECOND) & _WORD
    return value ^ value >> 31


def _mixed_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(_FIRST)
    values = (values ^ values >> np.uint64(27)) * np.uint64(_SECOND)
    return values ^ values >> np.uint64(31)
