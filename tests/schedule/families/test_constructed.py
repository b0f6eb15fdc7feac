"""Constructed: never longer than named families in the same memory, near the optimum where that can be known, and within its cap."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from helixpipe.errors import ConfigError
from helixpipe.parts.shapes import SHAPES
from helixpipe.predict.building import kept_bytes
from helixpipe.predict.estimate import Setting
from helixpipe.predict.memory import held_bytes
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule import improve, problem
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.families.constructed import STEP
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule

COSTS = ((1.0, 1.0, 1.0), (2.0, 3.0, 1.0))  # F, I and W of a rank's layers: matrices alone, and mostly attention


def alike(costs: tuple[float, float, float]):
    """Every stage and segment costs as much."""

    def prices(schedule: Schedule):
        pieces = len(schedule.stages) // len(schedule.ranks) * schedule.segments
        f, i, w = (each / pieces for each in costs)
        takes = {Pass.F: f, Pass.I: i, Pass.W: w, Pass.B: i + w}
        return lambda action: takes[action.kind]

    return prices


def kept(schedule: Schedule) -> float:
    """At most on any rank, in what one micro-batch leaves on it."""
    return max(peak_kept(schedule)) / (len(schedule.stages) // len(schedule.ranks) * schedule.segments)


def span(schedule: Schedule, prices) -> float:
    return simulate_schedule(schedule, prices(schedule)).makespan_s


def named(p: int, m: int, k: int, v: int):
    """Every named family that has these sizes."""
    for family in sorted(set(FAMILIES) - {"helix", "constructed"}):
        known, given = options(family), {}
        of_v = 2 if family in ("zb_v", "v_half", "v_min", "dualpipe_v") else 1
        if "stages_per_rank" in known:
            of_v = given["stages_per_rank"] = v
        if "segments" in known:
            given["segments"] = k
        if of_v == v and (k == 1 or "segments" in known) and not (family == "dualpipe_v" and m < 2 * p):
            yield build_schedule(family, ranks=p, layers=p * v, microbatches=m, **given)


@pytest.mark.parametrize(("p", "m", "k", "v"), [(2, 5, 1, 1), (4, 5, 1, 2), (3, 6, 1, 2), (3, 4, 3, 2)])
def test_never_longer_than_named_families_in_the_same_memory(p: int, m: int, k: int, v: int) -> None:
    for costs in COSTS:
        prices = alike(costs)
        known = [(kept(schedule), span(schedule, prices)) for schedule in named(p, m, k, v)]
        for cap in sorted({memory for memory, _ in known}):
            sizes = {"ranks": p, "layers": p * v, "microbatches": m, "segments": k, "stages_per_rank": v}
            more = {"memory": f"{cap:.6f}", "delay": 0.0, "tries": 40, "prices": prices}
            built = [build_schedule("constructed", **sizes, **more, placement=each) for each in ("looped", "v")]
            assert all(kept(schedule) <= cap + 1e-5 for schedule in built)
            shortest = min(span(schedule, prices) for schedule in built)
            assert shortest <= min(length for memory, length in known if memory <= cap) + 1e-3


class Yardstick:
    """Whether any order at all ends by some time: a search of all of them, in the order of their starts, that gives up early."""

    def __init__(self, schedule: Schedule, takes: dict[Action, int], limit: float) -> None:
        self.actions = [action for order in schedule.ranks for action in order]
        number = {action: i for i, action in enumerate(self.actions)}
        self.rank = [r for r, order in enumerate(schedule.ranks) for _ in order]
        self.takes = [takes[action] for action in self.actions]
        self.needs = [[number[each] for each in schedule.dependencies(action)] for action in self.actions]
        self.adds = [{Pass.F: 1, Pass.W: -1}.get(action.kind, 0) for action in self.actions]
        self.limit, self.tails = limit, [0] * len(self.actions)
        readers = [[j for j, needs in enumerate(self.needs) if i in needs] for i in range(len(self.actions))]

        def tail(i: int) -> int:
            self.tails[i] = self.takes[i] + max((self.tails[j] or tail(j) for j in readers[i]), default=0)
            return self.tails[i]

        for i in range(len(self.actions)):
            tail(i)

    def ends_by(self, time: int) -> bool:
        self.time, self.seen = time, set()
        ranks = range(max(self.rank) + 1)
        left = [sum(t for t, r in zip(self.takes, self.rank, strict=True) if r == rank) for rank in ranks]
        return self._search({}, [0] * len(left), [0] * len(left), left, 0)

    def _search(self, ends: dict[int, int], free: list[int], live: list[int], left: list[int], now: int) -> bool:
        if len(ends) == len(self.actions):
            return True
        starts = {}
        for i, needs in enumerate(self.needs):
            if i not in ends:
                known = [ends[j] for j in needs if j in ends]
                starts[i] = max(now, free[self.rank[i]], *known, 0)
                if starts[i] + self.tails[i] > self.time:
                    return False
        for rank in range(len(free)):
            mine = [i for i in starts if self.rank[i] == rank]
            if (
                mine
                and min(starts[i] for i in mine) + left[rank] + min(self.tails[i] - self.takes[i] for i in mine)
                > self.time
            ):
                return False
        key = (
            frozenset(ends),
            tuple(max(now, each) for each in free),
            tuple(max(now, e) for _, e in sorted(ends.items())),
        )
        if key in self.seen:
            return False
        self.seen.add(key)
        for i in sorted(starts, key=lambda i: (starts[i], -self.tails[i])):
            rank = self.rank[i]
            if any(j not in ends for j in self.needs[i]) or live[rank] + self.adds[i] > self.limit:
                continue
            then, held, rest = list(free), list(live), list(left)
            then[rank] = starts[i] + self.takes[i]
            held[rank] += self.adds[i]
            rest[rank] -= self.takes[i]
            if self._search(ends | {i: then[rank]}, then, held, rest, starts[i]):
                return True
        return False


SMALL = [
    (placement, p, v, m, k, memory)
    for placement, p, v, m, k in (
        ("line", 2, 1, 3, 1), ("line", 3, 1, 2, 1), ("looped", 2, 2, 2, 1), ("v", 2, 2, 2, 1), ("line", 2, 1, 2, 2),
    )
    for memory in (m, m, 1.5 if (v, k) != (1, 1) else 2, 1)
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_within_three_per_cent_of_the_optimum(number: int) -> None:
    """20 small instances, whose stages, passes and micro-batches take 1 to 9: no order at all is 3% shorter."""
    placement, p, v, m, k, memory = SMALL[number]
    draw = random.Random(number)
    each = {(s, kind): draw.randint(1, 9) for s in range(p * v) for kind in (Pass.F, Pass.I, Pass.W)}
    longer = [draw.choice((1, 1, 2)) for _ in range(m)]

    def takes(action: Action) -> int:
        if action.kind is Pass.B:
            return takes(action.sibling(Pass.I)) + takes(action.sibling(Pass.W))
        return each[action.stage, action.kind] * longer[action.microbatch]

    sizes = {"ranks": p, "layers": p * v, "microbatches": m, "segments": k, "stages_per_rank": v}
    own = {"placement": placement, "memory": str(memory), "delay": 0.0}
    built = build_schedule("constructed", **sizes, **own, prices=lambda schedule: takes)
    length = round(simulate_schedule(built, takes).makespan_s)
    split = Schedule(
        built.stages,
        tuple(
            tuple(f.sibling(kind) for f in order if f.kind is Pass.F for kind in (Pass.F, Pass.I, Pass.W))
            for order in built.ranks
        ),
    )
    measure = Yardstick(split, {a: takes(a) for order in split.ranks for a in order}, memory * v * k)
    assert measure.ends_by(length)
    assert not measure.ends_by(math.ceil(length / 1.03) - 1), f"{length} can be shorter"


def test_the_same_order_on_every_machine() -> None:
    sizes = {"ranks": 3, "layers": 6, "microbatches": 4, "segments": 2, "stages_per_rank": 2}
    draw = random.Random(1)
    known = {(s, mb, seg): draw.uniform(1, 2) for s in range(6) for mb in range(4) for seg in range(2)}

    def built(factor: float) -> Schedule:
        def prices(schedule: Schedule):
            return lambda a: factor * known[a.stage, a.microbatch, a.segment] * (2 if a.kind is Pass.B else 1)

        return build_schedule("constructed", **sizes, prices=prices, tries=60)

    assert built(1.0) == built(1.0) == built(1e12 * (1 + 2e-16))


@pytest.mark.parametrize("segments", [1, 2])
def test_one_for_other_costs_begins_with_the_one_there_is(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stages, never longer than that one's order would be, in a number of runs that is known before."""
    sizes = {"ranks": 3, "layers": 6, "microbatches": 6, "segments": segments, "stages_per_rank": 2}
    own = {"placement": "v", "delay": 0.0}
    usual = build_schedule("constructed", **sizes, **own, prices=alike(COSTS[1]))
    draw = random.Random(segments)
    longer = [draw.choice((1, 2, 5)) for _ in range(6)]

    def prices(schedule: Schedule):
        before = alike(COSTS[1])(schedule)
        return lambda action: before(action) * longer[action.microbatch]

    ran = []
    for module, name in ((problem, "list_schedule"), (improve, "list_schedule"), (improve, "in_order")):
        run = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda known, *a, run=run, **b: (ran.append(len(known.actions)), run(known, *a, **b))[1]
        )
    found = build_schedule("constructed", **sizes, **own, prices=prices, like=usual)
    assert found.stages == usual.stages
    assert sum(ran) <= STEP + 8 * ran[0]
    assert span(found, prices) < span(usual, prices) - 1e-3
    assert kept(found) <= 3 + 1e-9
    assert found == build_schedule("constructed", **sizes, **own, prices=prices, like=usual)
    with pytest.raises(
        ConfigError, match=r"^like: a schedule with other actions on its ranks; give one of these sizes"
    ):
        build_schedule("constructed", **(sizes | {"microbatches": 5}), **own, like=usual)


def test_documents_keep_what_their_own_segments_do() -> None:
    """Cut by documents, segments keep more or less than others do, and a micro-batch never more than one without."""
    setting = Setting(SHAPES["tiny"], 1024)
    rows = ((100, 824, 100), (1024,), (300, 300, 424), (1, 1023))
    batches = [setting.batch(2, (row,)) for row in rows]
    schedule = build_schedule("seq1f1b", ranks=2, layers=setting.shape.layers, microbatches=4, segments=2)
    keeps = kept_bytes(setting, batches, schedule)
    alone = lower(schedule.forward_only(), setting.shape, batches)
    for rank, order in enumerate(schedule.forward_only().ranks):
        left = [held.left_bytes for held in held_bytes(alone, setting.keeping)[rank]]
        each = [after - before for before, after in itertools.pairwise((0, *left))]
        assert [keeps.until_backward(action) for action in order] == each
        for mb in range(4):
            mine = [action for action in order if action.microbatch == mb]
            assert sum(map(keeps.until_backward, mine)) <= sum(map(keeps.usual, mine))
    assert len({keeps.until_backward(Action(0, Pass.F, mb, 0)) for mb in range(4)}) > 1


def test_memory_in_bytes_bounds_what_forwards_keep() -> None:
    """As predictions count it, action by action; where a W would wait for more than that, nothing is put off."""
    setting = Setting(SHAPES["tiny"], 1024)
    sizes = {"segments": 2, "placement": "line"}
    free = setting.build("constructed", 2, 6, **sizes)
    batch, cap = setting.batch(2), 3 * 2**20
    tight = setting.build("constructed", 2, 6, **sizes, memory=f"{cap / 2**30:.9f}GiB")
    assert peak_kept(free) > peak_kept(tight)
    alone = lower(tight.forward_only(), setting.shape, batch)
    for rank, order in enumerate(tight.ranks):
        left = [held.left_bytes for held in held_bytes(alone, setting.keeping)[rank][:2]]  # of both segments
        each = {0: left[0], 1: left[1] - left[0]}
        live, most = 0, 0
        for action in order:
            live += each[action.segment] * {Pass.F: 1, Pass.B: -1}[action.kind]
            most = max(most, live)
        assert 0 < most <= cap
        assert sum(each.values()) * 1.2 < cap


def test_a_cap_on_a_spread_vocabulary() -> None:
    sizes = {"ranks": 4, "layers": 8, "microbatches": 6, "segments": 2, "stages_per_rank": 2}
    for memory in ("1", "1.5", "3"):
        built = build_schedule("constructed", **sizes, memory=memory, vocabulary="spread", tries=10)
        check(built)
        peaks = peak_kept(
            built, lambda stage, built=built: any(part.kind == "attn" for part in built.stages[stage].parts)
        )
        assert max(peaks) <= float(memory) * 4 + 1e-6


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"placement": "ring"}, "schedule.placement: 'ring' is not known; known: looped, v, line"),
        (
            {"placement": "line", "stages_per_rank": 2},
            "schedule.stages_per_rank: 2, and in a line each rank has one; give 1, or another schedule.placement",
        ),
        ({"stages_per_rank": 0}, "schedule.stages_per_rank: 0; give at least 1"),
        (
            {"memory": "2 GB"},
            "schedule.memory: '2 GB'; give what a rank's forwards may keep, such as 24GiB, or 1.5 for one and a half micro-batches'",
        ),
        (
            {"memory": "2GiB"},
            "schedule.memory: '2GiB' needs a model, whose bytes are known; give micro-batches, such as 1.5",
        ),
        (
            {"memory": "0.75"},
            "schedule.memory: 0.75, and rank 0 keeps 1 of one micro-batch before its first backward; give at least 1, or more ranks",
        ),
        (
            {"memory": "0.75", "ends": (0, 2)},  # cut by cost a rank has three layers, and by number none has
            "schedule.memory: 0.75, and rank 0 keeps 1 of one micro-batch before its first backward; give at least 1, or more ranks",
        ),
        ({"delay": -1.0}, "schedule.delay: -1; give 0 or more"),
        ({"tries": -1}, "schedule.tries: -1; give how many, or 0 to have it chosen"),
        (
            {"stages_per_rank": 4},
            "schedule.stages_per_rank: 4 layers cannot fill 2 ranks of 4 stages each; use at most 2",
        ),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_schedule("constructed", ranks=2, layers=4, microbatches=2, **given)
    assert str(error.value) == told


def test_the_memory_that_is_told_is_enough() -> None:
    """Two of six layers on a rank are 4/3 of a quarter, and 1.33 is less."""
    sizes: dict[str, int] = {"ranks": 4, "layers": 6, "microbatches": 2}
    with pytest.raises(ConfigError, match=r"schedule.memory: 1, .* give at least 1\.34, or more ranks"):
        build_schedule("constructed", memory="1", **sizes)
    assert build_schedule("constructed", memory="1.34", **sizes)


def test_layers_that_differ_share_the_work_of_ranks() -> None:
    """Three cheap layers and a dear one, by turns: two ranks of two stages have as much to do."""
    costs = [0.4, 0.4, 0.4, 2.8] * 4
    built = build_schedule(
        "constructed", ranks=2, layers=16, microbatches=2, stages_per_rank=2, layer_costs=costs, placement="v"
    )
    counts = [sum(part.kind == "attn" for part in stage.parts) for stage in built.stages]
    at = [0, *itertools.accumulate(counts)]
    of = [sum(costs[a:b]) for a, b in itertools.pairwise(at)]
    assert abs((of[0] + of[3]) - (of[1] + of[2])) < 0.9


def test_layers_are_cut_by_number_where_their_cost_leaves_no_room() -> None:
    """Dear first: by cost the second rank has four of five layers, and keeps 1.6 of the mean."""
    sizes = {"ranks": 2, "layers": 5, "microbatches": 3, "layer_costs": [4.0, 1.0, 1.0, 1.0, 1.0], "placement": "line"}

    def counts(memory: str) -> list[int]:
        stages = build_schedule("constructed", **sizes, memory=memory).stages
        return [sum(part.kind == "attn" for part in stage.parts) for stage in stages]

    assert counts("1.7") == [1, 4]
    assert counts("1.3") == [2, 3]
    with pytest.raises(ConfigError, match=r"^schedule.memory: 1, and rank 1 keeps 1.2 of one micro-batch"):
        counts("1")
