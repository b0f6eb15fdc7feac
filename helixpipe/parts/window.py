"""What a window lets a query see, as arithmetic: how many pairs of a query and a key, which segments, how many tokens.

A token at i sees j where |i - j| < window (and j <= i where attention is causal); a window of 0 is all.
"""

from __future__ import annotations

from collections.abc import Sequence


def pairs(start: int, stop: int, length: int, causal: bool, window: int) -> int:
    """(query, key) that queries start..stop-1 of `length` tokens see, exactly."""
    back = _seen_back(stop, window) - _seen_back(start, window)
    if causal:
        return back
    # seen forwards is seen back from the end; each token sees itself once
    return back + _seen_back(length - start, window) - _seen_back(length - stop, window) - (stop - start)


def _seen_back(count: int, window: int) -> int:
    """Keys at or before their query, of the first `count` queries."""
    within = min(count, window) if window else count
    return within * (within + 1) // 2 + (count - within) * window


def tail(tokens: int, window: int) -> int:
    """Of so many tokens the last ones that any later token sees."""
    return min(tokens, window - 1) if window else tokens


def seen(lengths: Sequence[int], segment: int, window: int) -> range:
    """Earlier segments of which a segment's first token, and so any of its tokens, sees some key."""
    first, between = segment, 0
    while first > 0 and (not window or between + 1 < window):
        first -= 1
        between += lengths[first]
    return range(first, segment)
