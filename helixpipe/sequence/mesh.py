"""SequenceMesh: the ranks that share a sequence, and how they divide it.

    SequenceMesh(group)                         one ring of all ranks
    SequenceMesh(group, heads=4)                rings of size / 4 ranks, and at each place 4 that divide the heads
    SequenceMesh(group, rings=1, heads=8)       Ulysses alone
    SequenceMesh(group, rings=(2, 4))           a double ring: 2 nodes of 4 ranks
    SequenceMesh(group, rings=(2, 4), heads=2)  all of it

Ranks that divide the heads are neighbours, then those of the inner ring: what talks most is closest. A mesh is
arithmetic over one group and makes no other, so it costs nothing and ranks need not make it together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch.distributed as dist

from helixpipe.errors import ConfigError
from helixpipe.sequence.layout import Layout
from helixpipe.sequence.wire import Group, Peers, rank_of, size_of


class SequenceMesh:
    """`group` None: all ranks, or this process alone when there are none."""

    def __init__(self, group: Group = None, *, rings: int | tuple[int, ...] | None = None, heads: int = 1) -> None:
        """`rings`: sizes from the outer to the inner ring, as few as one; None is one ring of what `heads` leaves.

        Raises ConfigError when the sizes do not multiply to the group's.
        """
        group = group if group is not None or not dist.is_initialized() else dist.group.WORLD
        self.group, self.size, self.rank = group, size_of(group), rank_of(group)
        if rings is None and heads > 0 and self.size % heads == 0:
            rings = self.size // heads
        sizes = (rings,) if isinstance(rings, int) else rings
        if sizes is None or min(*sizes, heads, 1) < 1 or math.prod(sizes) * heads != self.size:
            raise ConfigError(_mismatch(sizes, heads, self.size))
        axes = [self._along(axis, (*sizes, heads)) for axis in range(len(sizes) + 1)]
        self.rings = tuple(axis for axis in axes[:-1] if axis.size > 1)
        """From the outer to the inner; none of one rank."""
        self.over_heads = axes[-1]
        self.heads, self.ring_size = heads, math.prod(sizes)

    @property
    def everyone(self) -> Peers:
        return Peers(self.group, range(self.size))

    @property
    def place(self) -> int:
        """This rank's place around the rings."""
        return self.rank // self.heads

    def layout(self, length: int, kind: str) -> Layout:
        """How a sequence of `length` tokens lies on these ranks. Raises ConfigError."""
        return Layout(kind, length, self.ring_size, self.heads)

    def place_of(self, steps: tuple[int, ...]) -> int:
        """The place whose keys are here after so many steps of each ring, from the outer to the inner."""
        return self.source(self.place, steps)

    def source(self, place: int, steps: tuple[int, ...]) -> int:
        """The same at another place around the rings."""
        found, inner = 0, self.ring_size
        for ring, step in zip(self.rings, steps, strict=True):
            inner //= ring.size
            found = found * ring.size + (place // inner % ring.size - step) % ring.size
        return found

    def last_step(self, before: tuple[int, ...], meets: Callable[[int, int], bool]) -> int:
        """Of the ring inside those that went so many steps, the last at which any place needs what is there.

        `meets(place, source)`: whether a place sees any key of a source.
        """
        sizes = [ring.size for ring in self.rings[len(before) :]]
        for step in reversed(range(sizes[0])):
            after = [(*before, step, *inner) for inner in itertools.product(*map(range, sizes[1:]))]
            if any(meets(place, self.source(place, steps)) for steps in after for place in range(self.ring_size)):
                return step
        return 0

    def _along(self, axis: int, sizes: tuple[int, ...]) -> Peers:
        """The ranks that differ from this one in one coordinate only."""
        inner = math.prod(sizes[axis + 1 :])
        first = self.rank - self.rank // inner % sizes[axis] * inner
        return Peers(self.group, range(first, first + sizes[axis] * inner, inner))


def mesh_of(group: Group | SequenceMesh) -> SequenceMesh:
    """A group as one ring of its ranks."""
    return group if isinstance(group, SequenceMesh) else SequenceMesh(group)


def _mismatch(sizes: tuple[int, ...] | None, heads: int, size: int) -> str:
    fits = ", ".join(f"{size // n} x {n}" for n in range(1, size + 1) if size % n == 0)
    rings = " x ".join(map(str, sizes)) if sizes else "any"
    return (
        f"sequence.mesh: rings of {rings} times {heads} ranks over heads are not the {size} ranks of the group; "
        f"rings x heads may be {fits}"
    )
