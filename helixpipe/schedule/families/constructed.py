"""Constructed: no published order, but one built for what stages cost and ranks may keep (what OptPipe, arXiv 2510.05186, and
AdaPtis, 2509.23722, look for with solvers).

    line      stage r on rank r                          0 1 2
    looped    stage c*p + r on rank r                    0 1 2 0 1 2
    v         there and back: 0 .. p-1, p-1 .. 0, ...    0 1 2 2 1 0

Where layers differ, stages are cut by what their layers cost. Orders to begin with are those of the named families that have this
placement, and some that list scheduling finds (see `construct`); each as it is, where it keeps no more than it may, and
as preferences. The best ones are improved (see `improve`). Weight gradients are put off to a W or not, whichever is shorter.

    p=2, m=3, line, F = 1, B = 2, but F = 2, B = 4 on rank 1, memory for 2 micro-batches:

    rank 0   F0 F1 .. .. .. .. .. B0 B0 F2 .. .. .. .. B1 B1 .. .. .. .. B2 B2
    rank 1   .. F0 F0 B0 B0 B0 B0 F1 F1 B1 B1 B1 B1 F2 F2 B2 B2 B2 B2

With equal stages it is never longer than the best of these families in the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.families.breadth_first import breadth_first
from helixpipe.schedule.families.cut_by_cost import cut_by_cost
from helixpipe.schedule.families.dualpipe_v import dualpipe_v
from helixpipe.schedule.families.looped import interleave
from helixpipe.schedule.families.seq1f1b import seq1f1b
from helixpipe.schedule.families.seq1f1b_zb import seq1f1b_zb
from helixpipe.schedule.families.split import cut_layers
from helixpipe.schedule.families.terapipe import terapipe
from helixpipe.schedule.families.units import check_segments
from helixpipe.schedule.families.v_half import v_half
from helixpipe.schedule.families.v_min import v_min
from helixpipe.schedule.families.zb_h2 import zb_h2
from helixpipe.schedule.families.zb_v import zb_v
from helixpipe.schedule.problem import Kept, Orders, Problem, best
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.schedule.vocabulary import Prices

PLACEMENTS = ("looped", "v", "line")
MEMORY = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(GiB)?")


def constructed(
    ranks: int,
    layers: int,
    microbatches: int,
    placement: str = "looped",
    segments: int = 1,
    stages_per_rank: int = 1,
    memory: str = "",
    tries: int = 0,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
    *,
    vocabulary: str = "last",
    layers_per_stage: Sequence[int] = (),
    layer_costs: Sequence[float] = (),
    prices: Prices = unit_durations,
    kept: Kept | None = None,
) -> Schedule:
    """`memory`: what forwards of a rank may keep at one time: "24GiB", where `kept` says bytes, or "1.5" times what one micro-batch
    leaves on a rank; p times when not given, as 1F1B. `tries`: runs against the clock that improve an order; 0 chooses.
    `prices`: of a schedule, what its actions take. `opaque`: see gpipe. `ends`: see split_layers.
    """
    check_segments(segments, opaque)
    of_stage = _ranks_of_stages(placement, ranks, stages_per_rank)
    by_cost = cut_by_cost(layer_costs or (1.0,) * layers, ends, of_stage)
    stages = cut_layers(layers, layers_per_stage or by_cost, len(of_stage), opaque)
    starts, unit = [], 0.0
    for actions, named in _modes(placement, ranks, microbatches, segments, stages_per_rank, stages):
        problem = Problem.of(Schedule(stages, actions), vocabulary, prices, unit)
        unit = problem.known.unit
        problem = _capped(problem, memory, kept)
        starts += [(problem, built) for order in named for built in problem.begun(order)]
        starts += [(problem, built) for wish in _wishes(actions, ranks, segments) for built in problem.preferred(wish)]
    problem, built = best(starts, tries)
    return problem.schedule(built)


def _ranks_of_stages(placement: str, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
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


def _modes(
    placement: str, ranks: int, microbatches: int, segments: int, stages_per_rank: int, stages: tuple[Stage, ...]
) -> Iterator[tuple[tuple[tuple[Action, ...], ...], list[Orders]]]:
    """Each rank's actions, and the orders of named families that are of these: with whole backwards, split ones, and DualPipeV's mix."""
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
        [s for s, r in enumerate(_ranks_of_stages(placement, ranks, stages_per_rank)) if r == rank]
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


def _wishes(actions: Orders, ranks: int, segments: int) -> Iterator[Orders]:
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


def _capped(problem: Problem, memory: str, kept: Kept | None) -> Problem:
    """With what `memory` allows each rank to keep."""
    match = MEMORY.fullmatch(memory or str(len(problem.draft.ranks)))
    if not match:
        raise ConfigError(
            f"schedule.memory: '{memory}'; give what a rank's forwards may keep, such as 24GiB, or 1.5 for one and a half micro-batches'"
        )
    if match[2] and kept is None:
        raise ConfigError(
            f"schedule.memory: '{memory}' needs a model, whose bytes are known; give micro-batches, such as 1.5"
        )
    keeps, puts_off = kept(problem.draft) if kept is not None else _shares(problem)
    forwards = [action for order in problem.draft.ranks for action in order if action.kind is Pass.F]
    one = sum(map(keeps, forwards)) / (problem.draft.microbatches * len(problem.draft.ranks))
    limit = float(match[1]) * (2.0**30 if match[2] else one)

    def told(amount: float) -> str:
        return f"{amount / 2**30:.3g}GiB" if match[2] else f"{amount / one:.3g}"

    capped = problem.capped((limit,) * len(problem.draft.ranks), keeps, puts_off)
    assert capped.cap is not None
    capped.cap.check(told)
    return capped


def _shares(problem: Problem) -> tuple[Callable[[Action], float], Callable[[Action], float]]:
    """Without a model a forward keeps as much as its stage has layers, until its W."""
    layers = [
        len({part.layer for part in stage.parts if part.about.attends or part.about.opaque})
        for stage in problem.draft.stages
    ]
    segments = problem.draft.segments

    def kept(forward: Action) -> float:
        return layers[forward.stage] / segments

    return kept, kept
