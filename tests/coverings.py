"""Of many cases the few that a suite has time for: all that is to meet meets in one of them. `make test-full` runs the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Case = TypeVar("Case")


def covering(cases: Iterable[Case], meetings: Callable[[Case], Iterable[Hashable]]) -> list[Case]:
    """Cases, in their order, that have every meeting which any case has: each time the one with the most new ones."""
    product = list(cases)
    numbers: dict[Hashable, int] = {}
    has = [sum(1 << numbers.setdefault(each, len(numbers)) for each in set(meetings(case))) for case in product]
    missing = (1 << len(numbers)) - 1
    chosen: set[int] = set()
    while missing:
        best = max(range(len(product)), key=lambda at: (has[at] & missing).bit_count())
        chosen.add(best)
        missing &= ~has[best]
    return [product[at] for at in sorted(chosen)]


def pairs(*choices: Hashable) -> list[Hashable]:
    """Every two choices, each by its place, so that equal values of two of them are told apart."""
    return list(itertools.combinations(enumerate(choices), 2))
