"""Channels: the process groups that messages between pipeline ranks go through.

    with tags     0 <=====> 1    one group for all: whatever comes is told apart
    direction     0 ------> 1    without: a communicator for each direction, so that messages to and fro travel at once, and
                  0 <------ 1    a receive that is posted early holds back no send
    pair          0 <-----> 1    one for both, where communicators are dear: messages take turns in the order of the program

A channel of two ranks is a group of its own, which every rank of the run makes, in one order: torch numbers groups by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from helixpipe.predict.hardware import Communicators

Way = tuple[int, int]
"""From a pipeline rank to another."""


class Channel(NamedTuple):
    """A group, the other end's rank in it, and whether the two are alone in it."""

    group: dist.ProcessGroup
    peer: int
    is_own: bool = False


class Channels:
    """One rank's. Messages of a way for which none was made go through the pipeline's own group."""

    def __init__(self, group: dist.ProcessGroup, communicators: Communicators, timeout_s: float) -> None:
        self._group, self._by_direction = group, communicators == "direction"
        self._timeout = timedelta(seconds=timeout_s)
        self.rank = dist.get_rank(group)
        self._made: dict[Way, Channel] = {}

    def of(self, src: int, dst: int) -> Channel:
        """What carries messages from rank `src` to `dst`; this rank is one of them."""
        if (src, dst) not in self._made:
            self._made[src, dst] = Channel(self._group, dst if src == self.rank else src)
        return self._made[src, dst]

    def make(self, way: Way, lines: Sequence[Sequence[int]]) -> None:
        """One for this way, in every pipeline. `lines`: the ranks of each, as the run numbers them. All ranks of the run call it."""
        backend = dist.get_backend_config(self._group)
        for line in lines:
            group = dist.new_group([line[rank] for rank in way], self._timeout, backend)
            if dist.get_rank() in line and self.rank in way:
                for each in [way] if self._by_direction else [way, way[::-1]]:
                    self._made[each] = Channel(group, 1 - dist.get_rank(group), True)

    def ways(self, of: Iterable[Way]) -> list[Way]:
        """Those that need a channel of their own, in the one order in which all ranks make them: a pair's two beside each other."""
        each = set(of) if self._by_direction else {(min(way), max(way)) for way in of}
        return sorted(each, key=lambda way: (min(way), max(way), way))
