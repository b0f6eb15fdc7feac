"""Constructed: no published order, but one built for what stages cost and ranks may keep (what OptPipe, arXiv 2510.05186, and
AdaPtis, 2509.23722, look for with solvers).

    line      stage r on rank r                          0 1 2
    looped    stage c*p + r on rank r                    0 1 2 0 1 2
    v         there and back: 0 .. p-1, p-1 .. 0, ...    0 1 2 2 1 0

Where layers differ, stages are cut by what their layers cost. Orders to begin with are those of the named families that have this
placement, and some that list scheduling finds (see `construct`); each as it is, where it keeps no more than it may, and
as preferences. The best ones are improved (see `improve`). Weight gradients are put off to a W or not, whichever is shorter.

    line, memory for 2 micro-batches, p=3, m=4, k=1, v=1, one column a unit of time, F = I = W = 1:

    rank 0   F0 F1 .. .. .. I0 W0 F2 I1 W1 F3 .. .. I2 W2 I3 W3
    rank 1   .. F0 F1 .. I0 W0 I1 W1 F2 .. .. F3 I2 W2 I3 W3
    rank 2   .. .. F0 I0 F1 I1 W0 W1 .. F2 I2 W2 F3 I3 W3

Bubble and memory have no formula: it is built for the costs it is given. In the same memory it is never longer than the named
families of its placement where stages are equal, since it begins with theirs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.cap import NoRoom
from helixpipe.schedule.construct import Built
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.families.beginnings import modes, ranks_of_stages, wishes
from helixpipe.schedule.families.cut_by_cost import cut_by_cost
from helixpipe.schedule.families.looped import check_filled
from helixpipe.schedule.families.split import cut_layers
from helixpipe.schedule.families.units import check_segments
from helixpipe.schedule.problem import Keeps, Kept, Orders, Problem, improved, shortest
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.vocabulary import DELAY, Prices

UNLIKE = 0.01
"""Micro-batches whose costs are within this share of one another are taken as they are numbered."""
STEP, FEWEST = 12_000, 12
"""Actions in all runs together that find the order of one step's micro-batches, and runs at least: counts, so that every rank
builds the same."""
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
    delay: float = DELAY,
    opaque: Collection[int] = (),
    ends: Sequence[float] = (0, 0),
    *,
    vocabulary: str = "last",
    layers_per_stage: Sequence[int] = (),
    layer_costs: Sequence[float] = (),
    prices: Prices = unit_durations,
    kept: Kept | None = None,
    like: Schedule | None = None,
) -> Schedule:
    """`memory`: what forwards of a rank may keep at one time: "24GiB", where `kept` says bytes, or "1.5" times what one micro-batch
    leaves on a rank; when not given p times what it leaves on the fullest, as 1F1B. `tries`: runs against the clock that improve
    an order; 0 chooses. `delay`: what a message is taken to be on its way, in forwards of a stage: with some an order bears messages that are late.
    `prices`: of a schedule, what its actions take. `opaque`: see gpipe. `ends`: see split_layers.

    Layers that differ are cut by `layer_costs`; where a rank could not keep its stages so, into as many each.

    `like`: one that was built for other costs. Its stages stay as they are, its orders are the first to begin with, and there are
    `STEP` actions in all runs together, so that one is built for each step.
    """
    check_segments(segments, opaque)
    if not 0 <= delay < math.inf:
        raise ConfigError(f"schedule.delay: {delay:g}; give 0 or more")
    if tries < 0:
        raise ConfigError(f"schedule.tries: {tries}; give how many, or 0 to have it chosen")
    of_stage = ranks_of_stages(placement, ranks, stages_per_rank)
    check_filled(ranks, layers, stages_per_rank, ends)
    cuts: list[Sequence[int]]
    if like is not None:
        cuts = [layers_of(like, len(of_stage))]
    elif layers_per_stage:
        cuts = [layers_per_stage]
    else:
        by_number = [layers * (s + 1) // len(of_stage) - layers * s // len(of_stage) for s in range(len(of_stage))]
        cuts = [cut_by_cost(layer_costs or (1.0,) * layers, ends, of_stage), by_number]
    missed: list[NoRoom] = []
    for counts in cuts:
        stages = cut_layers(layers, counts, len(of_stage), opaque)
        found: list[tuple[Problem, Built]] = []
        for actions, named in modes(placement, ranks, microbatches, segments, stages_per_rank, stages):
            draft, unit = Schedule(stages, actions), found[0][0].known.unit if found else 0.0
            before = [[action for action in order if action.stage < len(stages)] for order in (like or draft).ranks]
            if any(set(order) != set(own) for order, own in zip(before, actions, strict=True)):
                continue  # other passes than it has
            try:
                problems = _problems(draft, vocabulary, prices, delay, unit, memory, kept)
            except NoRoom as error:  # what waits for a W may be more than what waits for a B
                missed.append(error)
                continue
            wished = list(wishes(actions, ranks, segments))
            if like is None:
                found.append(improved(*shortest(_begun(problems, named, wished)), tries))
            else:
                found.append(_of_a_step(problems, before, named, wished, tries))
        if found:
            problem, built = shortest(found)
            return problem.schedule(built)
    if not missed:
        raise ConfigError(
            "like: a schedule with other actions on its ranks; give one of these sizes and of this placement"
        )
    raise min(missed, key=lambda error: error.least)


def layers_of(schedule: Schedule, stages: int) -> list[int]:
    """How many layers each of the first stages has."""
    return [
        len({part.layer for part in stage.parts if part.about.attends or part.about.opaque})
        for stage in schedule.stages[:stages]
    ]


def _problems(
    draft: Schedule, vocabulary: str, prices: Prices, delay: float, unit: float, memory: str, kept: Kept | None
) -> list[Problem]:
    """One for each order in which micro-batches may be taken. Raises NoRoom where the memory holds none."""
    first = Problem.of(draft, vocabulary, prices, delay, unit)
    keeps = kept(first.draft) if kept is not None else _shares(first)
    limit = _limit(first, memory, kept is not None, keeps)
    found = [first if each == first.numbers else first.taken_as(each) for each in _numbers(first)]
    return [problem.capped((limit,) * len(draft.ranks), keeps) for problem in found]


def _of_a_step(
    problems: Sequence[Problem], before: Orders, named: Sequence[Orders], wished: Sequence[Orders], tries: int
) -> tuple[Problem, Built]:
    """From an order for other costs: micro-batches as it suits them best, then all other orders with them so, then improved."""
    runs = max(FEWEST, STEP // len(problems[0].known.actions))
    begun = list(itertools.islice(_begun(problems, [before], []), runs))
    problem, built = shortest(begun)
    left = runs - len(begun)
    more = list(itertools.islice(_begun([problem], named, wished), left // 2))
    return improved(*shortest(more, (problem, built)), max(1, tries or left - len(more)))


def _begun(
    problems: Sequence[Problem], named: Sequence[Orders], wished: Sequence[Orders]
) -> Iterator[tuple[Problem, Built]]:
    """All orders to begin with."""
    for order in named:
        for problem in problems:
            yield from ((problem, built) for built in problem.begun(order))
    for wish in wished:
        for problem in problems:
            yield from ((problem, built) for built in problem.preferred(wish))


def _numbers(problem: Problem) -> list[tuple[int, ...]]:
    """Orders in which micro-batches may be taken: as they are numbered and, where they cost unlike, by that, up, down, and the
    cheap ones first and last."""
    known, as_numbered = problem.known, problem.numbers
    costs = [0] * len(as_numbered)
    for action, takes in zip(known.actions, known.takes, strict=True):
        costs[action.microbatch] += takes
    if max(costs) <= min(costs) * (1 + UNLIKE):
        return [as_numbered]
    up = tuple(sorted(as_numbered, key=costs.__getitem__))
    return list(dict.fromkeys((as_numbered, up, up[::-1], (*up[::2], *up[1::2][::-1]))))


def _limit(problem: Problem, memory: str, in_bytes: bool, keeps: Keeps) -> float:
    """What `memory` allows each rank to keep. Raises NoRoom where that is less than a micro-batch."""
    ranks = len(problem.draft.ranks)
    match = MEMORY.fullmatch(memory or str(ranks))
    if not match:
        raise ConfigError(
            f"schedule.memory: '{memory}'; give what a rank's forwards may keep, such as 24GiB, or 1.5 for one and a half micro-batches'"
        )
    if match[2] and not in_bytes:
        raise ConfigError(
            f"schedule.memory: '{memory}' needs a model, whose bytes are known; give micro-batches, such as 1.5"
        )
    of_rank = [
        sum(keeps.usual(a) for a in order if a.kind is Pass.F and a.stage < problem.own) / problem.draft.microbatches
        for order in problem.draft.ranks
    ]
    one = sum(of_rank) / ranks
    limit = float(match[1]) * (2.0**30 if match[2] else one) if memory else ranks * max(of_rank)

    def told(amount: float) -> str:
        return f"{_rounded_up(amount / 2**30)}GiB" if match[2] else _rounded_up(amount / one)

    capped = problem.capped((limit,) * ranks, keeps)
    assert capped.cap is not None
    capped.cap.check(told)
    return limit


def _rounded_up(amount: float) -> str:
    """In three digits, as an option takes it: what is at least an amount is enough."""
    digits = max(0, min(9, 2 - math.floor(math.log10(amount)))) if amount else 0
    text = f"{math.ceil(amount * 10**digits - 1e-6) / 10**digits:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _shares(problem: Problem) -> Keeps:
    """Without a model a forward keeps as much as its stage has layers, until its W."""
    layers, segments = layers_of(problem.draft, problem.own), problem.draft.segments

    def kept(forward: Action) -> float:
        return layers[forward.stage] / segments

    return Keeps(kept, kept, kept)
