"""The families: the staircase drawn in each docstring is what it generates, and its formulas hold."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.errors import ConfigError
from helixpipe.parts.part import AROUND_ATTENTION
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_program, simulate_schedule
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import FAMILIES, build_schedule, gpipe, helix, one_f_one_b, options
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule
from helixpipe.view.text import staircase

some = settings(max_examples=100, deadline=None)
sizes = st.integers(1, 7), st.integers(1, 10), st.integers(1, 13)  # ranks, layers, micro-batches


def drawn(family: object) -> str:
    """The staircase in the docstring of a family's file, a line a rank, without indentation."""
    import sys

    doc = sys.modules[family.__module__].__doc__
    return "\n".join(line.strip() for line in doc.splitlines() if line.strip().startswith("rank "))


def unit_time(schedule: Schedule) -> dict[Action, float]:
    spans = simulate_schedule(schedule, lambda action: 1.0).spans
    return {span.action: span.start_s for row in spans for span in row}


def cost(stage_f: float, stage_b: float):
    return lambda action: stage_f if action.kind is Pass.F else stage_b


# Staircases


@pytest.mark.parametrize("family", [gpipe, one_f_one_b])
def test_the_docstring_draws_what_the_family_makes(family) -> None:
    assert staircase(family(3, 3, 4)).rstrip() == drawn(family)


def test_helix_draws_what_it_makes() -> None:
    """Pld is block l of offset d, Ald attention of layer l, offset d; after `|` the backward mirrors."""
    rows = drawn(helix).splitlines()
    assert len(rows) == 3
    schedule = helix(3, 3, 3, folds=1)
    start = unit_time(schedule)
    for rank, row in enumerate(rows):
        cells = row.split("|")[0].split()[2:]
        for column, cell in enumerate(cells):
            if cell == "...":
                continue
            kind, layer, offset = cell[0], int(cell[1]), int(cell[2])
            action = Action(2 * layer + (kind == "A"), Pass.F, offset)
            assert schedule.placement[action.stage, offset] == rank, cell
            assert start[action] == column, cell
        forward = [a for a in schedule.ranks[rank] if a.kind is Pass.F]
        assert len(forward) == sum(cell != "..." for cell in cells)


def test_two_folds_take_turns_at_every_slot() -> None:
    """Offset d of fold f is micro-batch d + f*p: fold 0, then fold 1, of the same stage."""
    for order in helix(3, 3, 6, folds=2).ranks:
        forward = [a for a in order if a.kind is Pass.F]
        for first, second in zip(forward[::2], forward[1::2], strict=True):
            assert (first.stage, first.microbatch + 3) == (second.stage, second.microbatch)


# Any size: checked, complete, in the order of its name


@some
@given(*sizes, st.sampled_from(["gpipe", "1f1b"]))
def test_any_size_of_whole_layers(ranks: int, more: int, microbatches: int, family: str) -> None:
    layers = ranks + more - 1
    schedule = build_schedule(family, ranks=ranks, layers=layers, microbatches=microbatches)
    check(schedule)
    for rank, order in enumerate(schedule.ranks):
        assert Counter(order) == Counter(Action(rank, k, mb) for k in (Pass.F, Pass.B) for mb in range(microbatches))
        kept = min(ranks - rank, microbatches) if family == "1f1b" else microbatches
        assert peak_kept(schedule)[rank] == kept
        if family == "gpipe":
            assert [a.kind for a in order] == [Pass.F] * microbatches + [Pass.B] * microbatches


@some
@given(
    *sizes, st.integers(1, 4), st.sampled_from(list(AROUND_ATTENTION)), st.sampled_from(["sequential", "forward_first"])
)
def test_any_size_of_helix(ranks: int, layers: int, microbatches: int, folds: int, travel: str, groups: str) -> None:
    schedule = build_schedule(
        "helix", ranks=ranks, layers=layers, microbatches=microbatches, folds=folds, travel=travel, groups=groups
    )
    check(schedule)
    assert len(schedule.stages) == 2 * layers + 1
    everything = Counter(action for order in schedule.ranks for action in order)
    assert everything == Counter(
        Action(s, k, mb) for s in range(2 * layers + 1) for k in (Pass.F, Pass.B) for mb in range(microbatches)
    )
    for (stage, mb), rank in schedule.placement.items():
        layer, offset = stage // 2, mb % (folds * ranks) % ranks
        assert rank == (layer + offset + 1 if stage % 2 else layer) % ranks
    for order in schedule.ranks:
        for run in _runs(order, folds * ranks if groups == "sequential" else microbatches):
            half = len(run) // 2
            assert [a.kind for a in run] == [Pass.F] * half + [Pass.B] * half
            assert run[half:] == [action.sibling(Pass.B) for action in reversed(run[:half])]


def _runs(order: tuple[Action, ...], size: int) -> list[list[Action]]:
    """A rank's actions by the group of micro-batches they belong to; a group must not come up again."""
    runs: list[list[Action]] = []
    for action in order:
        if not runs or runs[-1][0].microbatch // size != action.microbatch // size:
            runs.append([])
        runs[-1].append(action)
    groups = [run[0].microbatch // size for run in runs]
    assert groups == sorted(set(groups))
    return runs


@some
@given(*sizes, st.integers(1, 3), st.sampled_from(["sequential", "forward_first"]))
def test_the_blocks_of_helix_are_balanced(ranks: int, layers: int, microbatches: int, folds: int, groups: str) -> None:
    """Every rank runs as many attentions as any other, when micro-batches and layers divide."""
    layers, microbatches = layers * ranks, microbatches * ranks
    schedule = helix(ranks, layers, microbatches, folds, groups=groups)
    counts = {sum(a.stage % 2 for a in order) for order in schedule.ranks}
    assert counts == {2 * layers * microbatches // ranks}


def test_layers_that_do_not_divide_go_to_the_middle() -> None:
    def layers_of(layers: int, stages: int) -> list[int]:
        return [sum(part.kind == "attn" for part in stage.parts) for stage in split_layers(layers, stages)]

    assert layers_of(8, 4) == [2, 2, 2, 2]
    assert layers_of(9, 4) == [2, 3, 2, 2]
    assert layers_of(10, 4) == [2, 3, 3, 2]
    assert layers_of(11, 4) == [3, 3, 3, 2]
    assert layers_of(3, 2) == [2, 1]
    assert layers_of(5, 1) == [5]


def test_opaque_layers_are_one_block() -> None:
    schedule = build_schedule("1f1b", ranks=2, layers=3, microbatches=2, opaque=(1, 2))
    assert list(map(str, schedule.stages)) == ["embed norm.0 qkv.0 attn.0 proj.0 mlp.0 block.1", "block.2 head.3"]


# Formulas, with costs from a table


@pytest.mark.parametrize("family", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 1), (2, 8), (4, 8), (8, 3), (8, 16)])
@pytest.mark.parametrize(("f", "b"), [(1, 1), (1, 2), (3, 7)])
def test_the_bubble_of_whole_layers(family: str, p: int, m: int, f: int, b: int) -> None:
    """(p-1)(f+b)."""
    timeline = simulate_schedule(build_schedule(family, ranks=p, layers=p, microbatches=m), cost(f, b))
    assert timeline.makespan_s == m * (f + b) + (p - 1) * (f + b)
    assert timeline.idle_s == ((p - 1) * (f + b),) * p


# forward and backward, the recompute included, of what is before, in and after attention
TABLES = {"attention large": ((6, 60, 18), (17, 150, 51)), "attention small": ((6, 2, 18), (12, 5, 36))}


def helix_cost(schedule: Schedule, table: str):
    """Durations of a stage from a table of (pre, attention, post)."""
    part = {"qkv": 0, "attn": 1, "mlp": 2}
    forward, backward = TABLES[table]

    def duration(action: Action) -> float:
        times = forward if action.kind is Pass.F else backward
        return sum(times[part[p.kind]] for p in schedule.stages[action.stage].parts if p.kind in part)

    return duration


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("p", [2, 4, 8])
def test_the_bubble_of_a_naive_helix_group(p: int, table: str) -> None:
    """(p-1)(t_pre + t_post), F, B and recompute summed; no attention in it, and no L/p."""
    forward, backward = TABLES[table]
    pre, attention, post = (f + b for f, b in zip(forward, backward, strict=True))
    for layers in (p, p + 1, 2 * p, 4 * p):
        schedule = build_schedule("helix", ranks=p, layers=layers, microbatches=p, folds=1)
        ideal = layers * (pre + attention + post)  # p micro-batches over p ranks
        timeline = simulate_schedule(schedule, helix_cost(schedule, table))
        assert timeline.makespan_s == ideal + (p - 1) * (pre + post)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_attention_is_in_no_bubble_of_a_naive_helix_group(p: int) -> None:
    """Idle time stays what it is when attention takes ten times as long."""
    schedule = build_schedule("helix", ranks=p, layers=2 * p, microbatches=p, folds=1)
    once = simulate_schedule(schedule, helix_cost(schedule, "attention large"))

    def slower(action: Action) -> float:
        return helix_cost(schedule, "attention large")(action) * (10 if action.stage % 2 else 1)

    assert sum(simulate_schedule(schedule, slower).idle_s) == sum(once.idle_s)


def paper_ratio(family: str, recompute: bool, **given: object) -> float:
    """Makespan over the time without bubble and recompute: 7B, p=8, m=16, causal 128k, free messages."""
    tokens, shape = 131072, SHAPES["7b"]
    schedule = build_schedule(family, ranks=8, layers=shape.layers, microbatches=16, **given)
    batch = Batch(1, (tokens,))

    def stage_flops(stage: int, kind: Pass) -> float:
        parts = [part for part in schedule.stages[stage].parts if part.kind != "head"]
        forward = sum(shape.forward_flops(part, batch, 0) for part in parts)
        if kind is Pass.F:
            return forward
        attention = sum(shape.forward_flops(part, batch, 0) for part in parts if part.kind == "attn")
        again = forward - attention if recompute else 0.0
        return again + sum(shape.backward_flops(part, batch, 0) for part in parts)

    table = {(s, k): stage_flops(s, k) for s in range(len(schedule.stages)) for k in (Pass.F, Pass.B)}
    ideal = sum(
        shape.forward_flops(p, batch, 0) + shape.backward_flops(p, batch, 0)
        for stage in schedule.stages
        for p in stage.parts
        if p.kind != "head"
    )
    timeline = simulate_schedule(schedule, lambda action: table[action.stage, action.kind])
    return timeline.makespan_s / (ideal * 16 / 8)


@pytest.mark.parametrize(
    ("family", "recompute", "given", "ratio"),
    [
        ("1f1b", False, {}, 1.4375),
        ("gpipe", False, {}, 1.4375),
        ("helix", False, {"folds": 1, "groups": "forward_first"}, 1.0266),
        ("helix", True, {"folds": 1, "groups": "forward_first"}, 1.1166),
    ],
)
def test_the_ratios_of_the_7b_model_at_128k(family: str, recompute: bool, given: dict, ratio: float) -> None:
    assert paper_ratio(family, recompute, **given) == pytest.approx(ratio, abs=5e-5)


# Options and sizes that cannot be


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("helx", {}, "schedule.family: 'helx' is not known; did you mean 'helix'?"),
        ("zzz", {}, f"schedule.family: 'zzz' is not known; known: {', '.join(FAMILIES)}"),
        ("helix", {"fold": 2}, "schedule.fold: helix has no such option; did you mean 'folds'?"),
        ("1f1b", {"folds": 2}, "schedule.folds: 1f1b has no such option; known: opaque, ends"),
        ("helix", {"folds": 0}, "schedule.folds: 0; give at least 1 (1 is the naive order, 2 the two-fold)"),
        ("helix", {"travel": "kv"}, "schedule.travel: 'kv' is not known; known: none, qkv, attention"),
        ("helix", {"groups": "both"}, "schedule.groups: 'both' is not known; known: sequential, forward_first"),
        ("gpipe", {"ranks": 0}, "schedule.ranks: 0; give at least 1"),
        ("gpipe", {"layers": -1}, "schedule.layers: -1; give at least 1"),
        ("helix", {"microbatches": 0}, "schedule.microbatches: 0; give at least 1"),
        ("1f1b", {"opaque": (9,)}, "schedule.opaque: there is no layer 9; layers are 0..3"),
        ("1f1b", {"ranks": 5}, "schedule.ranks: 4 layers cannot fill 5 stages; use at most 4 ranks"),
    ],
)
def test_what_cannot_be_built_says_what_can(family: str, given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_schedule(family, **({"ranks": 2, "layers": 4, "microbatches": 4} | given))
    assert str(error.value) == message


def test_options_are_those_beyond_the_sizes() -> None:
    assert options("1f1b")[0] == "opaque"
    assert options("helix") == ("folds", "travel", "groups", "balance", "work")


def test_messages_that_take_time_do_not_change_the_order() -> None:
    schedule = build_schedule("helix", ranks=4, layers=4, microbatches=8)
    shape = ModelShape(layers=4, hidden=8, heads=2, ffn=16, vocabulary=11)
    program = lower(schedule, shape, Batch(1, (16,)))
    timeline = simulate_program(program, helix_cost(schedule, "attention large"), lambda message: message.elements / 10)
    assert timeline.order == schedule.ranks
