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

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence

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
from helixpipe.schedule.problem import Kept, Orders, Problem, improved, shortest
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.vocabulary import DELAY, Prices

UNLIKE = 0.01
"""Micro-batches whose costs are within this share of one another are taken as they are numbered."""
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
) -> Schedule:
    """`memory`: what forwards of a rank may keep at one time: "24GiB", where `kept` says bytes, or "1.5" times what one micro-batch
    leaves on a rank; p times when not given, as 1F1B. `tries`: runs against the clock that improve an order; 0 chooses.
    `delay`: what a message is taken to be on its way, in forwards of a stage: with some an order bears messages that are late.
    `prices`: of a schedule, what its actions take. `opaque`: see gpipe. `ends`: see split_layers.

    Layers that differ are cut by `layer_costs`; where a rank could not keep its stages so, into as many each.
    """
    check_segments(segments, opaque)
    if not 0 <= delay < math.inf:
        raise ConfigError(f"schedule.delay: {delay:g}; give 0 or more")
    if tries < 0:
        raise ConfigError(f"schedule.tries: {tries}; give how many, or 0 to have it chosen")
    of_stage = ranks_of_stages(placement, ranks, stages_per_rank)
    check_filled(ranks, layers, stages_per_rank, ends)
    by_cost = cut_by_cost(layer_costs or (1.0,) * layers, ends, of_stage)
    by_number = [layers * (s + 1) // len(of_stage) - layers * s // len(of_stage) for s in range(len(of_stage))]
    missed: list[NoRoom] = []
    for counts in [layers_per_stage] if layers_per_stage else [by_cost, by_number]:
        stages = cut_layers(layers, counts, len(of_stage), opaque)
        found: list[tuple[Problem, Built]] = []
        for actions, named in modes(placement, ranks, microbatches, segments, stages_per_rank, stages):
            draft, unit = Schedule(stages, actions), found[0][0].known.unit if found else 0.0
            try:
                problems = _problems(draft, vocabulary, prices, delay, unit, memory, kept)
            except NoRoom as error:  # what waits for a W may be more than what waits for a B
                missed.append(error)
                continue
            wished = list(wishes(actions, ranks, segments))
            found.append(improved(*shortest(_begun(problems, named, wished)), tries))
        if found:
            problem, built = shortest(found)
            return problem.schedule(built)
    raise min(missed, key=lambda error: error.least)


def _problems(
    draft: Schedule, vocabulary: str, prices: Prices, delay: float, unit: float, memory: str, kept: Kept | None
) -> list[Problem]:
    """One for each order in which micro-batches may be taken. Raises NoRoom where the memory holds none."""
    found: list[Problem] = []
    for numbers in _numbers(draft, prices):
        problem = Problem.of(draft, vocabulary, prices, delay, numbers, unit)
        unit = problem.known.unit
        found.append(_capped(problem, memory, kept))
    return found


def _begun(
    problems: Sequence[Problem], named: Sequence[Orders], wished: Sequence[Orders]
) -> Iterator[tuple[Problem, Built]]:
    """All orders to begin with."""
    for problem in problems:
        for order in named:
            yield from ((problem, built) for built in problem.begun(order))
        for wish in wished:
            yield from ((problem, built) for built in problem.preferred(wish))


def _numbers(draft: Schedule, prices: Prices) -> list[tuple[int, ...]]:
    """Orders in which micro-batches may be taken: as they are numbered and, where they cost unlike, by that, up, down, and the
    cheap ones first and last."""
    takes, count = prices(draft), draft.microbatches
    costs = [0.0] * count
    for order in draft.ranks:
        for action in order:
            costs[action.microbatch] += takes(action)
    as_numbered = tuple(range(count))
    if max(costs) <= min(costs) * (1 + UNLIKE):
        return [as_numbered]
    up = tuple(sorted(as_numbered, key=costs.__getitem__))
    return list(dict.fromkeys((as_numbered, up, up[::-1], (*up[::2], *up[1::2][::-1]))))


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
    forwards = [
        action
        for order in problem.draft.ranks
        for action in order
        if action.kind is Pass.F and action.stage < problem.own
    ]
    one = sum(map(keeps, forwards)) / (problem.draft.microbatches * len(problem.draft.ranks))
    limit = float(match[1]) * (2.0**30 if match[2] else one)

    def told(amount: float) -> str:
        return f"{_rounded_up(amount / 2**30)}GiB" if match[2] else _rounded_up(amount / one)

    capped = problem.capped((limit,) * len(problem.draft.ranks), keeps, puts_off)
    assert capped.cap is not None
    capped.cap.check(told)
    return capped


def _rounded_up(amount: float) -> str:
    """In three digits, as an option takes it: what is at least an amount is enough."""
    digits = max(0, min(9, 2 - math.floor(math.log10(amount)))) if amount else 0
    text = f"{math.ceil(amount * 10**digits - 1e-6) / 10**digits:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


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
