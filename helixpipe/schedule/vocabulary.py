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

from helixpipe.parts.part import Part, ends
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
    own = len(schedule.stages)
    ranks, layers = len(schedule.ranks), schedule.layers
    embed, head = ends(layers)
    changed = {embed: Part("joined", 0), head: Part("final", layers)}
    stages = [replace(stage, parts=tuple(changed.get(part, part) for part in stage.parts)) for stage in schedule.stages]
    first, last = (next(s for s, stage in enumerate(schedule.stages) if end in stage.parts) for end in (embed, head))
    units = [(a.microbatch, a.segment) for order in schedule.ranks for a in order if a[:2] == (first, Pass.F)]
    logits = [Stage((Part("logits", layers, r, ranks),)) for r in range(ranks)]
    lookups = [Stage((Part("lookup", 0, r, ranks),)) for r in range(ranks)]
    stages += [*logits, Stage((Part("loss", layers),)), *lookups]
    loss, table = own + ranks, own + ranks + 1
    losses = schedule.placement
    extras: list[list[Action]] = []
    for rank in range(ranks):
        mine = [(own + rank, Pass.B, *unit) for unit in units]
        mine += [(loss, kind, *unit) for kind in (Pass.B, Pass.F) for unit in units if losses[last, unit[0]] == rank]
        mine += [(own + rank, Pass.F, *unit) for unit in units]
        mine += [(table + rank, kind, *unit) for kind in (Pass.F, Pass.B) for unit in units]
        extras.append([Action(*each) for each in mine])
    draft = Schedule(tuple(stages), tuple((*more, *order) for more, order in zip(extras, schedule.ranks, strict=True)))
    paced = {
        Action(table + rank, Pass.F, *unit): Action(first, Pass.F, *before)
        for unit, before in zip(units[LOOK_UPS:], units, strict=False)
        for rank in range(ranks)
    }
    known = graph(draft, prices(draft), after=paced)
    return schedule_of(draft, known, _soonest(known, schedule))


def _soonest(known: Graph, schedule: Schedule) -> Built:
    """With as many more forwards ahead as pay."""
    best: Built | None = None
    places = range(len(known.actions))
    for more in MORE:
        chains = [[known.number[action] for action in _ahead(order, more)] for order in schedule.ranks]
        try:
            built = list_schedule(known, places, chains=chains)
        except Stuck:  # so many forwards wait for backwards that come behind them
            break
        if best is not None and built.makespan > best.makespan * (1 - GAIN):
            break
        best = built
    assert best is not None  # the family's own order can be run: shards wait for nothing but what is in it
    return best


def _ahead(order: Sequence[Action], more: int) -> Iterator[Action]:
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
