"""What `constructed` begins with: where stages are, orders of named families that are there, and preferences.

line      0 1 2            whole backwards: seq1f1b, terapipe      split: seq1f1b_zb, zb_h2
looped    0 1 2 0 1 2      whole: interleaved, breadth_first
v         0 1 2 2 1 0      split: zb_v, v_half, v_min              a mix: dualpipe_v
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.families.breadth_first import breadth_first
from helixpipe.schedule.families.dualpipe_v import dualpipe_v
from helixpipe.schedule.families.looped import interleave
from helixpipe.schedule.families.seq1f1b import seq1f1b
from helixpipe.schedule.families.seq1f1b_zb import seq1f1b_zb
from helixpipe.schedule.families.terapipe import terapipe
from helixpipe.schedule.families.v_half import v_half
from helixpipe.schedule.families.v_min import v_min
from helixpipe.schedule.families.zb_h2 import zb_h2
from helixpipe.schedule.families.zb_v import zb_v
from helixpipe.schedule.problem import Orders
from helixpipe.schedule.stage import Stage

PLACEMENTS = ("looped", "v", "line")


def ranks_of_stages(placement: str, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    if placement not in PLACEMENTS:
        raise ConfigError(f"schedule.placement: '{placement}' is not known; known: {', '.join(PLACEMENTS)}")
    if stages_per_rank < 1:
        raise ConfigError(f"schedule.stages_per_rank: {stages_per_rank}; give at least 1")
    if placement == "line" and stages_per_rank > 1:
        raise ConfigError(
            f"schedule.stages_per_rank: {stages_per_rank}, and in a line each rank has one; give 1, or another schedule.placement"
        )
    there, back = range(ranks), range(ranks - 1, -1, -1)
    return tuple(r for turn in range(stages_per_rank) for r in (back if placement == "v" and turn % 2 else there))


Mode = tuple[tuple[tuple[Action, ...], ...], list[Orders]]
"""Each rank's actions, and the orders of named families that are of these."""


@lru_cache(maxsize=8)  # every step may ask
def modes(
    placement: str, ranks: int, microbatches: int, segments: int, stages_per_rank: int, stages: tuple[Stage, ...]
) -> tuple[Mode, ...]:
    """With whole backwards, split ones, and DualPipeV's mix."""
    return tuple(_modes(placement, ranks, microbatches, segments, stages_per_rank, stages))


def _modes(
    placement: str, ranks: int, microbatches: int, segments: int, stages_per_rank: int, stages: tuple[Stage, ...]
) -> Iterator[Mode]:
    whole: list[Orders] = []
    split: list[Orders] = []
    if placement == "v" and stages_per_rank > 1:
        if stages_per_rank == 2 and segments == 1:
            split += [family(ranks, 2 * ranks, microbatches).ranks for family in (zb_v, v_half, v_min)]
    else:
        whole.append(interleave(ranks, microbatches, segments, stages, 0).ranks)
        if segments == 1:
            whole.append(breadth_first(ranks, len(stages), microbatches, stages_per_rank).ranks)
    if stages_per_rank == 1:
        whole += [family(ranks, ranks, microbatches, segments).ranks for family in (seq1f1b, terapipe)]
        split.append(seq1f1b_zb(ranks, ranks, microbatches, segments).ranks)
        split += [zb_h2(ranks, ranks, microbatches).ranks] if segments == 1 else []
    of_rank = [
        [s for s, r in enumerate(ranks_of_stages(placement, ranks, stages_per_rank)) if r == rank]
        for rank in range(ranks)
    ]
    for passes, named in (((Pass.F, Pass.B), whole), ((Pass.F, Pass.I, Pass.W), split)):
        actions = tuple(
            tuple(
                Action(stage, kind, mb, segment)
                for kind in passes
                for stage in own
                for mb in range(microbatches)
                for segment in range(segments)
            )
            for own in of_rank
        )
        yield actions, named
    if placement == "v" and stages_per_rank == 2 and segments == 1 and microbatches >= 2 * ranks:
        mixed = dualpipe_v(ranks, 2 * ranks, microbatches).ranks
        yield mixed, [mixed]


def wishes(actions: Orders, ranks: int, segments: int) -> Iterator[Orders]:
    """Preferences: backwards first, W's last; of forwards the first units, or groups of as many units as feed all ranks."""
    group = max(1, -(-ranks // segments))

    def backward(action: Action) -> tuple[int, ...]:
        return (0 if action.kind in BACKWARD else 2, action.microbatch, -action.stage, -action.segment)

    def first_units(action: Action) -> tuple[int, ...]:
        if action.kind is Pass.F:
            return (1, action.microbatch, action.segment, -action.stage)
        return backward(action)

    def groups(action: Action) -> tuple[int, ...]:
        if action.kind is Pass.F:
            return (1, action.microbatch // group, action.stage, action.microbatch, action.segment)
        return backward(action)

    for key in (first_units, groups):
        yield [sorted(own, key=key) for own in actions]
