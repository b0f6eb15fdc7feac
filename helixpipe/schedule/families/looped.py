"""Looped placement: stage c*p + r on rank r, so that a micro-batch goes round the ranks v times.

Micro-batches go in groups. A group takes its units (segments) through chunk 0 of every rank, then through
chunk 1, and so on; its backwards take the chunks from the last to the first:

    forwards of a rank    group 0: c0 c0 c0 c1 c1 c1    group 1: c0 c0 c0 c1 c1 c1    ...

With p units or more in a group its first unit is back from the last rank when its last one has left, so all
ranks are fed. Shorter groups do not only wait: two of them can wait for each other. So a group too short is
filled up with micro-batches that do not exist, and these are dropped from the finished order: what is left
waits only for what is left, and came after it in an order where nothing waits for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import most_stages, split_layers
from helixpipe.schedule.families.units import Unit, backward_units, forward_units, take_turns
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage


def looped(
    ranks: int, layers: int, stages_per_rank: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> tuple[Stage, ...]:
    """The v*p stages; raises ConfigError where layers cannot fill them."""
    check_filled(ranks, layers, stages_per_rank, ends)
    return split_layers(layers, ranks, opaque, ends, stages_per_rank)


def check_filled(ranks: int, layers: int, stages_per_rank: int, ends: Sequence[float]) -> None:
    """Raise ConfigError where layers fill the ranks with fewer stages each, but not with so many."""
    if stages_per_rank < 1:
        raise ConfigError(f"schedule.stages_per_rank: {stages_per_rank}; give at least 1")
    most = most_stages(layers, ends)
    if ranks <= most < ranks * stages_per_rank:
        raise ConfigError(
            f"schedule.stages_per_rank: {layers} layers cannot fill {ranks} ranks of {stages_per_rank} stages each; "
            f"use at most {most // ranks}"
        )


def interleave(ranks: int, microbatches: int, segments: int, stages: tuple[Stage, ...], group: int) -> Schedule:
    """Groups of `group` units (0: see `_groups`), and on each rank forwards and backwards in turn."""
    chunks = range(len(stages) // ranks)
    groups = _groups(ranks, microbatches, segments, group)
    forwards = _rounds(groups, chunks, Pass.F, segments, forward_units)
    backwards = _rounds(groups, chunks[::-1], Pass.B, segments, backward_units)
    round_units = max(map(len, groups)) * segments
    orders = []
    for rank in range(ranks):
        ahead = (len(chunks) - 1) * round_units + 2 * (ranks - rank - 1) + segments - 1
        turns = take_turns(forwards, backwards, ahead)
        orders.append(tuple(Action(c * ranks + rank, k, mb, seg) for c, k, mb, seg in turns if mb < microbatches))
    return Schedule(stages, tuple(orders))


def _rounds(
    groups: list[list[int]],
    chunks: Iterable[int],
    kind: Pass,
    segments: int,
    units: Callable[[Iterable[int], int], list[Unit]],
) -> list[Action]:
    """Every group through every chunk; the stage in these actions is the chunk."""
    chunks = list(chunks)
    return [Action(chunk, kind, *unit) for group in groups for chunk in chunks for unit in units(group, segments)]


def _groups(ranks: int, microbatches: int, segments: int, group: int) -> list[list[int]]:
    """The micro-batches of each group; numbers from `microbatches` on fill up a group too short to feed the ranks.

    By default the smallest groups that are never too short: k * ceil(p/k) units, and some larger ones where
    micro-batches do not divide. A `group` given is kept, with what is left at the end: less memory, more bubble.
    """
    least = -(-ranks // segments)
    if group and (group % segments or group < least * segments):
        raise ConfigError(
            f"schedule.group: {group} units; give a multiple of {segments} segments that is at least "
            f"{least * segments}, to feed {ranks} ranks"
        )
    if group:
        starts = [*range(0, microbatches, group // segments), microbatches]
    else:
        count = max(1, microbatches // least)
        starts = [microbatches * i // count for i in range(count + 1)]
    sizes = [(first, end - first) for first, end in itertools.pairwise(starts)]
    return [[*range(at, at + size), *range(microbatches, microbatches + least - size)] for at, size in sizes]
