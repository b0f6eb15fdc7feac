"""Every way a schedule can be wrong. Each error names rank, position, action and reason.

In this order: the stages cover the model; every action once; what belongs together is on one rank; a
stage on several ranks has one home; every order can be carried out (else the cycle is shown).
"""

from __future__ import annotations

import itertools

from helixpipe.errors import ScheduleError
from helixpipe.parts.part import chain, vocabulary_shards
from helixpipe.schedule.action import BACKWARD, Action, Pass
from helixpipe.schedule.order import Stuck, times
from helixpipe.schedule.schedule import Schedule

WHOLE = ({Pass.F, Pass.B}, {Pass.F, Pass.I, Pass.W})
"""All passes of a segment where nothing is recomputed ahead."""
Place = dict[Action, tuple[int, int]]  # action -> (rank, position)


def check(schedule: Schedule, *, forward_only: bool = False) -> None:
    """Prove that a schedule can run; raises ScheduleError with the first fault.

    The order in which messages are posted is derived from the order proved here (see `lower`), so a
    schedule that passes cannot deadlock, on a backend with tags or on one that matches messages of a
    pair by order alone. `forward_only` accepts a schedule of forwards, as an evaluation runs.
    """
    _check_stages(schedule)
    places = _check_once(schedule)
    _check_all_there(schedule, places, forward_only)
    _check_ranks(schedule, places)
    _check_homes(schedule)
    _check_order(schedule, places)


def _check_stages(schedule: Schedule) -> None:
    if not schedule.ranks or not schedule.stages:
        raise ScheduleError("a schedule needs at least one rank and one stage")
    for s, stage in enumerate(schedule.stages):
        if not stage.parts:
            raise ScheduleError(f"stage {s} has no parts; leave it out")
    parts = [part for stage in schedule.stages for part in stage.parts]
    opaque, shards = {part.layer for part in parts if part.about.opaque}, min(vocabulary_shards(parts), len(parts))
    # a layer has a part at least: a file that names layer 999999999 need not make us list them all
    whole = chain(min(schedule.layers, len(parts)), opaque, shards)
    if shards:  # whose stages stand anywhere
        place = {part: i for i, part in enumerate(whole)}
        stages = sorted(schedule.stages, key=lambda stage: place.get(stage.parts[0], -1))
        parts = [part for stage in stages for part in stage.parts]
    if tuple(parts) != whole:
        there = set(parts)
        missing = [str(part) for part in whole if part not in there]
        fault = f"{missing[0]} is in no stage" if missing else "their parts repeat or are out of order"
        last = whole[-1]._replace(layer=schedule.layers)
        raise ScheduleError(f"the stages do not cover the model from {whole[0]} to {last}: {fault}")


def _check_once(schedule: Schedule) -> Place:
    places: Place = {}
    for rank, order in enumerate(schedule.ranks):
        for position, action in enumerate(order):
            if min(action.microbatch, action.segment) < 0:
                raise ScheduleError(
                    "micro-batches and segments count from 0", rank=rank, position=position, action=action
                )
            if not 0 <= action.stage < len(schedule.stages):
                raise ScheduleError(
                    f"there is no stage {action.stage}; stages are 0..{len(schedule.stages) - 1}",
                    rank=rank,
                    position=position,
                    action=action,
                )
            if action in places:
                first = places[action]
                raise ScheduleError(
                    f"duplicated: it is also on rank {first[0]} at position {first[1]}; remove one",
                    rank=rank,
                    position=position,
                    action=action,
                )
            places[action] = (rank, position)
    if not places:
        raise ScheduleError("a schedule needs at least one action")
    return places


def _check_all_there(schedule: Schedule, places: Place, forward_only: bool) -> None:
    has: dict[tuple[int, int, int], set[Pass]] = {}
    for stage, kind, mb, seg in places:
        has.setdefault((stage, mb, seg), set()).add(kind)
    whole = ({Pass.F},) if forward_only else WHOLE
    for unit in itertools.product(range(len(schedule.stages)), range(schedule.microbatches), range(schedule.segments)):
        if has.get(unit) not in whole:
            stage, mb, seg = unit
            _check_passes(schedule, places, Action(stage, Pass.F, mb, seg), forward_only)


def _check_passes(schedule: Schedule, places: Place, forward: Action, forward_only: bool) -> None:
    """One forward, and either one B or both I and W; an R only with a backward to use it."""
    has = {kind: forward.sibling(kind) in places for kind in Pass}
    likely = places.get(forward) or next((places[b] for k in Pass if (b := forward.sibling(k)) in places), None)
    rank = likely[0] if likely else None
    if not has[Pass.F]:
        raise ScheduleError(
            "missing: every stage needs a forward for every segment of every micro-batch", rank=rank, action=forward
        )
    if forward_only:
        extra = next((kind for kind in Pass if kind is not Pass.F and has[kind]), None)
        if extra:
            raise ScheduleError("a forward-only schedule has no such pass", rank=rank, action=forward.sibling(extra))
        return
    if has[Pass.B] and (has[Pass.I] or has[Pass.W]):
        raise ScheduleError(
            "a backward is either B, or I and W, not both; remove one", rank=rank, action=forward.sibling(Pass.B)
        )
    if not has[Pass.B] and not has[Pass.I]:
        raise ScheduleError(
            "missing: every forward needs its backward, B, or I and W", rank=rank, action=forward.sibling(Pass.B)
        )
    if has[Pass.I] != has[Pass.W]:
        raise ScheduleError("missing: an I needs its W", rank=rank, action=forward.sibling(Pass.W))


def _check_ranks(schedule: Schedule, places: Place) -> None:
    """All passes and segments of one (stage, micro-batch) on one rank: they share what forward kept."""
    first: dict[tuple[int, int], tuple[int, Action]] = {}
    for action, (rank, position) in places.items():
        home, other = first.setdefault((action.stage, action.microbatch), (rank, action))
        if home != rank:
            raise ScheduleError(
                f"stage {action.stage} runs micro-batch {action.microbatch} on rank {home} ({other}) and here; all "
                "passes and segments of one micro-batch share what its forward kept, so put them on one rank",
                rank=rank,
                position=position,
                action=action,
            )


def _check_homes(schedule: Schedule) -> None:
    for s, (stage, ranks) in enumerate(zip(schedule.stages, schedule.ranks_of, strict=True)):
        if stage.home is not None and not 0 <= stage.home < len(schedule.ranks):
            raise ScheduleError(f"stage {s} ({stage}) has home {stage.home}; ranks are 0..{len(schedule.ranks) - 1}")
        if stage.home is None and len(ranks) > 1 and stage.has_parameters:
            action = next(a for a in schedule.ranks[ranks[1]] if a.stage == s)
            raise ScheduleError(
                f"stage {s} ({stage}) has parameters and runs on ranks {', '.join(map(str, ranks))}; keep it on one, "
                "or give it a home from which its weights travel",
                rank=ranks[1],
                position=schedule.ranks[ranks[1]].index(action),
                action=action,
            )


def _check_order(schedule: Schedule, places: Place) -> None:
    recomputes = any(action.kind is Pass.R for action in places)
    for rank, order in enumerate(schedule.ranks if recomputes else ()):
        for position, action in enumerate(order):
            if action.kind in BACKWARD and (again := action.sibling(Pass.R)) in places and places[again][1] > position:
                raise ScheduleError(
                    f"{again} comes after the backward that would use it", rank=rank, position=position, action=action
                )
    try:
        times(schedule, lambda action: 1.0)
    except Stuck as stuck:
        raise _cycle(schedule, places, stuck.positions) from None


def _cycle(schedule: Schedule, places: Place, positions: list[int]) -> ScheduleError:
    """Walk from a rank that stands still to what it waits for, until a rank comes up again."""
    rank = next(r for r, at in enumerate(positions) if at < len(schedule.ranks[r]))
    walked: dict[int, str] = {}
    while rank not in walked:
        action = schedule.ranks[rank][positions[rank]]
        needed = next(n for n in schedule.dependencies(action) if places[n][1] >= positions[places[n][0]])
        other, at = places[needed]
        if other == rank:
            return ScheduleError(
                f"needs {needed}, which comes later on the same rank, at position {at}",
                rank=rank,
                position=positions[rank],
                action=action,
            )
        blocker = schedule.ranks[other][positions[other]]
        behind = "" if blocker == needed else f" behind {blocker}"
        walked[rank] = f"rank {rank} waits at {action} for {needed}, on rank {other}{behind}"
        rank = other
    cycle = list(walked.values())[list(walked).index(rank) :]
    action = schedule.ranks[rank][positions[rank]]
    return ScheduleError(f"deadlock: {'; '.join(cycle)}", rank=rank, position=positions[rank], action=action)
