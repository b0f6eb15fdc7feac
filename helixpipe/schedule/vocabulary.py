"""The vocabulary on all ranks: a family's schedule with embedding and head in shards, one of each a rank.

    lookup.0 ──┐                             ┌── logits.0 ──┐
    lookup.1 ──┼── joined · layers ... final ┼── logits.1 ──┼── loss        joined begins the first layer's stage, final ends
    lookup.2 ──┘                             └── logits.2 ──┘               the last one's; the loss is on that one's rank

Each rank keeps the family's own order. Shards and the loss come between, each as soon as all it waits for is there and its rank is
free; they are short, and others wait for them. A backward now waits until all ranks have come to the shards of its unit. So
the family's forwards are taken earlier, some more of them before each backward, as far as that pays. Where weight gradients are
put off, a second way is tried with each number of forwards: that order as what a rank prefers, and W, I and F run past one
another where it would stand still, but for forwards, which keep their distance.

    1f1b, p=2, m=2: stages 0 and 1 are the layers', 2 and 3 look up, 4 and 5 are logits, 6 is the loss

    rank 0   2F0 2F1 0F0 0F1 4F0 ... 4F1 ... 4B0 ... ... ... 4B1 ... 0B0 2B0 0B1 2B1
    rank 1   3F0 3F1 ... 1F0 5F0 1F1 6F0 6B0 5B0 5F1 6F1 6B1 5B1 1B0 1B1 3B0 ... 3B1
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part, chain, ends
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.chains import in_chains
from helixpipe.schedule.construct import Built, list_schedule, schedule_of
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.graph import Graph, graph
from helixpipe.schedule.order import Stuck
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage

Prices = Callable[[Schedule], Callable[[Action], float]]
"""What each action of a schedule takes, in any unit."""
VOCABULARIES = ("last", "spread")
LOOK_UPS = 3
"""Units whose rows are looked up before the first stage comes to them."""
MORE = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Forwards that are tried in the warm-up beyond the family's own."""
DELAY = 0.5
"""What a message is taken to be on its way, in forwards of a stage: found with the links of accelerators (see benchmarks)."""
GAIN = 0.0005
"""What a try must save of the step, to be one."""
PAYS = 0.1
"""What more forwards ahead must save of the step, for each share by which a rank keeps more of them."""
VAIN = 2
"""Tries in a row that save nothing, after which there is no other."""


def spread(schedule: Schedule, prices: Prices = unit_durations) -> Schedule:
    """The schedule with embedding and head in shards, one of each a rank; `prices` decide the order. Stages keep their numbers."""
    draft, paced = with_shards(schedule)
    costs, own = prices(draft), len(schedule.stages)
    known = graph(draft, costs, delay(draft, costs, own), paced)
    tries = deeper(known, schedule.ranks, lambda built: True)
    best = next(tries)  # the family's own order can always be run
    counts = [_counted(action, own) for action in known.actions]
    kept = _kept(counts, best)
    for built in tries:
        more = _kept(counts, built)
        if 1 - built.makespan / best.makespan >= PAYS * (more / kept - 1):
            best, kept = built, more
    return schedule_of(draft, known, best)


def check_words(shards: int, words: int) -> None:
    """Raise ConfigError where a shard would have no word."""
    if shards > words:
        raise ConfigError(
            f"schedule.vocabulary: spread over {shards} ranks, and model.vocabulary is {words}; use last, or fewer ranks"
        )


def _counted(action: Action, own: int) -> int:
    """How many forwards of the first `own` stages are kept more when an action has run."""
    if action.stage >= own:
        return 0
    return 1 if action.kind is Pass.F else -(action.kind in (Pass.B, Pass.W))


def _kept(counts: Sequence[int], built: Built) -> int:
    """The most forwards that a rank keeps at one time."""
    return max(max(itertools.accumulate(map(counts.__getitem__, order)), default=0) for order in built.orders)


def delay(
    draft: Schedule, costs: Callable[[Action], float], own: int, share: float = DELAY
) -> Callable[[Action, Action], float]:
    """What every message is taken to be on its way, so that ranks do not stand still where real ones are a little late.

    `share`: of the mean forward of the first `own` stages, those that are no shards.
    """
    forwards = [costs(a) for order in draft.ranks for a in order if a.kind is Pass.F and a.stage < own]
    travels = share * math.fsum(forwards) / len(forwards)
    return lambda made, read: travels


def with_shards(schedule: Schedule) -> tuple[Schedule, dict[Action, Action]]:
    """The stages with shards, each rank's actions with those of shards before its own, and which wait for which to come in time.

    Shards are in the order in which a rank prefers them: what others wait for most is first.
    """
    ranks, layers, own = len(schedule.ranks), schedule.layers, len(schedule.stages)
    lookups, joined, final, logits, loss = _cut(chain(layers, vocabulary_shards=ranks), ranks)
    around = dict(zip(ends(layers), (joined, final), strict=True))
    first, last = (next(s for s, stage in enumerate(schedule.stages) if end in stage.parts) for end in around)
    stages = [replace(stage, parts=tuple(around.get(part, part) for part in stage.parts)) for stage in schedule.stages]
    stages += [Stage((part,)) for part in (*lookups, *logits, loss)]
    units = [(a.microbatch, a.segment) for order in schedule.ranks for a in order if a[:2] == (first, Pass.F)]
    orders = []
    for rank, order in enumerate(schedule.ranks):
        table, words, joins = own + rank, own + ranks + rank, own + 2 * ranks
        losses = [unit for unit in units if schedule.placement[last, unit[0]] == rank]
        shards = [Action(words, Pass.B, *unit) for unit in units]
        shards += [Action(joins, kind, *unit) for kind in (Pass.B, Pass.F) for unit in losses]
        shards += [Action(words, Pass.F, *unit) for unit in units]
        shards += [Action(table, kind, *unit) for kind in (Pass.F, Pass.B) for unit in units]
        orders.append((*shards, *order))
    paced = {
        Action(own + rank, Pass.F, *unit): Action(first, Pass.F, *before)
        for unit, before in zip(units[LOOK_UPS:], units, strict=False)
        for rank in range(ranks)
    }
    return Schedule(tuple(stages), tuple(orders)), paced


def _cut(whole: Sequence[Part], ranks: int) -> tuple[Sequence[Part], Part, Part, Sequence[Part], Part]:
    """A model's chain without its layers: shards of the table, what joins them, what ends the last layer, shards, the loss."""
    return whole[:ranks], whole[ranks], whole[-ranks - 2], whole[-ranks - 1 : -1], whole[-1]


def deeper(known: Graph, orders: Sequence[Sequence[Action]], fits: Callable[[Built], bool]) -> Iterator[Built]:
    """Shards as soon as they can be, and more and more of each rank's own forwards ahead while that pays and fits."""
    best, vain = 0, 0
    ways = (_strictly, _loosely) if any(action.kind is Pass.W for order in orders for action in order) else (_strictly,)
    for more in MORE:
        built = [each for way in ways for each in way(known, orders, more) if fits(each)]
        if not built:
            return
        shortest = min(built, key=lambda each: each.makespan)
        if not best or shortest.makespan < best * (1 - GAIN):
            best, vain = shortest.makespan, 0
            yield shortest
            continue
        vain += 1
        if vain == VAIN:
            return


def _strictly(known: Graph, orders: Sequence[Sequence[Action]], more: int) -> Iterator[Built]:
    """Each rank's own actions in order; none where so many forwards wait for backwards that come behind them."""
    chains = [[known.number[action] for action in ahead(order, more)] for order in orders]
    with suppress(Stuck):
        yield in_chains(known, chains)


def _loosely(known: Graph, orders: Sequence[Sequence[Action]], more: int) -> Iterator[Built]:
    """Forwards in their order, W in theirs and all else in its own, each rank preferring the whole; no forward earlier in it."""
    rank_of = list(range(len(known.actions)))
    chains: list[list[int]] = []
    after: list[tuple[int, int]] = []
    for order in orders:
        for place, action in enumerate(ahead(order, more)):
            rank_of[known.number[action]] = len(rank_of) + place
        lanes: dict[Pass, list[int]] = {Pass.F: [], Pass.I: [], Pass.W: []}
        before = []  # of each forward, how many of the other lanes the order has before it
        for action in order:
            if action.kind is Pass.F:
                before.append((len(lanes[Pass.I]), len(lanes[Pass.W])))
            lanes.get(action.kind, lanes[Pass.I]).append(known.number[action])
        for forward, counts in zip(lanes[Pass.F][more:], before, strict=False):
            others = zip((lanes[Pass.I], lanes[Pass.W]), counts, strict=True)
            after += [(lane[count - 1], forward) for lane, count in others if count]
        chains += lanes.values()
    yield list_schedule(known.behind(after), rank_of, chains=chains)


def ahead(order: Sequence[Action], more: int) -> Iterator[Action]:
    """An order with each action that is no forward behind so many more forwards than it was."""
    forwards = [action for action in order if action.kind is Pass.F]
    seen = given = 0
    for action in order:
        if action.kind is Pass.F:
            seen += 1
            continue
        yield from forwards[given : seen + more]
        given = max(given, min(seen + more, len(forwards)))
        yield action
    yield from forwards[given:]
