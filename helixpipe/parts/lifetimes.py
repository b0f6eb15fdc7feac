"""Lifetimes: in a run of parts, which values may go when, and which gradients are there when.

    forward    norm        qkv         attn        proj        mlp          a value goes after its last reader,
               n made      n goes      q k v go    o x go      y goes       a gradient after its maker's backward
    backward   dx  <------ dn dx <---- dq dk dv dx do dx <---- dy <-------- dx'

The tape lets go by this, and predictions count by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from helixpipe.parts.part import Part, Value


@dataclass(frozen=True)
class Lifetimes:
    """By the place of each part in the run."""

    drops: tuple[tuple[Value, ...], ...]
    """Values that nobody reads once this part's forward has run."""
    pending: tuple[tuple[Value, ...], ...]
    """Values of which there are gradients when this part's backward begins, its own outputs' among them."""
    own: tuple[tuple[Value, ...], ...]
    """Values made in this run that this part alone reads."""


def lifetimes(parts: Sequence[Part], stays: Collection[Value], gives: Collection[Value]) -> Lifetimes:
    """`stays`: values that somebody reads later, outside of the run. `gives`: those whose gradients come from outside."""
    last: dict[Value, int] = {}
    made: dict[Value, int] = {}
    readers: dict[Value, list[int]] = {}
    for i, part in enumerate(parts):
        last.update((value, i) for value in (*part.makes, *part.reads))
        made.update((value, i) for value in part.makes)
        for value in part.reads:
            readers.setdefault(value, []).append(i)
    drops = tuple(tuple(v for v, end in last.items() if end == i and v not in stays) for i in range(len(parts)))
    pending = tuple(
        tuple(v for v, end in last.items() if made.get(v, -1) <= i and (v in gives or end > max(i, made.get(v, -1))))
        for i in range(len(parts))
    )
    own = tuple(
        tuple(v for v in part.reads if v in made and v not in stays and readers[v] == [i])
        for i, part in enumerate(parts)
    )
    return Lifetimes(drops, pending, own)
