"""The vocabulary on all ranks: a family's schedule with embedding and head in shards, one of each a rank.

    lookup.0 ──┐                             ┌── logits.0 ──┐
    lookup.1 ──┼── joined · layers ... final ┼── logits.1 ──┼── loss        joined begins the first layer's stage, final ends
    lookup.2 ──┘                             └── logits.2 ──┘               the last one's; the loss is on that one's rank

Each rank keeps the family's own order. Shards and the loss come between, each as soon as all it waits for is there and its rank is
free; they are short, and others wait for them. A backward now waits until all ranks have come to the shards of its unit. So
the family's forwards are taken earlier, `more` of them before each backward, as far as that shortens the step:

    p=2, m=3, seq1f1b without segments; L: shards of the head and the loss, F and B of the family's own stages

    rank 0   F0 F1 L0 L0 F2 B0 L1 L1 B1 L2 L2 B2          more=0
    rank 0   F0 F1 L0 F2 L0 L1 B0 ...                     more=1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from helixpipe.parts.part import Part, chain, ends
from helixpipe.schedule.action import Action, Pass
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
GAIN = 0.002
"""What one more try must save of the step; each keeps more activations."""


def spread(schedule: Schedule, prices: Prices = unit_durations) -> Schedule:
    """The schedule with embedding and head in shards, one of each a rank; `prices` decide the order. Stages keep their numbers."""
    draft, paced = with_shards(schedule)
    known = graph(draft, prices(draft), after=paced)
    return schedule_of(draft, known, _soonest(known, schedule))


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


def _soonest(known: Graph, schedule: Schedule) -> Built:
    """With as many more forwards ahead as pay."""
    best: Built | None = None
    places = range(len(known.actions))
    for more in MORE:
        chains = [[known.number[action] for action in ahead(order, more)] for order in schedule.ranks]
        try:
            built = list_schedule(known, places, chains=chains)
        except Stuck:  # so many forwards wait for backwards that come behind them
            break
        if best is not None and built.makespan > best.makespan * (1 - GAIN):
            break
        best = built
    assert best is not None  # the family's own order can be run: shards wait for nothing but what is in it
    return best


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
