"""Weights that visit a rank, and their gradients: when they come, how many bytes they are, when they are gone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.estimate import Setting, estimate
from helixpipe.predict.guests import guests
from helixpipe.predict.memory import held_bytes
from helixpipe.predict.standing import owned_and_visiting
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower

H, VOCABULARY = 8, 24
SHAPE = ModelShape(layers=4, hidden=H, heads=2, ffn=16, vocabulary=VOCABULARY)
TIED = replace(SHAPE, tied=True)
BF16 = Keeping("none", 2)


@pytest.mark.parametrize("travel", ["qkv", "attention"])
def test_weights_and_gradients_come_once_and_all_of_them_leave(travel: str) -> None:
    schedule = build_schedule("helix", ranks=2, layers=4, microbatches=8, travel=travel)
    program = lower(schedule, SHAPE, Batch(1, (16,)))
    _, visiting = owned_and_visiting(schedule, SHAPE)
    for rank, order in enumerate(schedule.ranks):
        found, elements = guests(program, rank, BF16, SHAPE), sum(visiting[rank].values())
        assert elements > 0
        assert sum(each.came_bytes for each in found.values()) == 2 * elements
        assert sum(size for each in found.values() for _, size in each.made_bytes) == 4 * elements
        assert sum(each.leaves_bytes for each in found.values()) == 6 * elements
        visited = {a.stage for a, each in found.items() if each.came_bytes}
        for stage in visited:
            uses = [action for action in order if action.stage == stage]
            first = next(action for action in uses if action.kind is Pass.B)
            assert found[uses[0]].came_bytes > 0
            assert found[first].made_bytes
            assert {a for a in uses if a in found and found[a].made_bytes} == {first}
        held = held_bytes(program, BF16)[rank]
        assert held[-1].left_bytes == 0


def test_a_table_that_visits_the_head_has_its_gradient_from_the_first_w_on() -> None:
    schedule = build_schedule("zb_h1", ranks=2, layers=4, microbatches=4)
    found = guests(lower(schedule, TIED, Batch(1, (16,))), 1, BF16, TIED)
    table, head = H * VOCABULARY, len(schedule.stages) - 1
    order = [action for action in schedule.ranks[1] if action.stage == head]
    first = next(action for action in order if action.kind is Pass.W)
    assert found[order[0]].came_bytes == 2 * table
    assert [size for _, size in found[first].made_bytes] == [4 * table]
    assert found[order[-1]].leaves_bytes == 6 * table
    assert len(found) == 3
    sliced = guests(lower(schedule, TIED, Batch(1, (16,))), 1, replace(BF16, head_chunk=4), TIED)
    (made,) = [action for action, each in sliced.items() if each.made_bytes]
    assert made == Action(head, Pass.I, *first[2:])  # a head in slices puts nothing off


def test_nobody_visits_where_nothing_travels() -> None:
    for family, options in (("1f1b", {}), ("helix", {"travel": "none"})):
        program = lower(build_schedule(family, ranks=2, layers=4, microbatches=4, **options), SHAPE, Batch(1, (16,)))
        assert [guests(program, rank, BF16, SHAPE) for rank in range(2)] == [{}, {}]


def test_an_accelerator_holds_its_share_of_what_visits() -> None:
    """Two that share matrices hold half of them each; two that share the sequence hold all of them each."""
    schedule = build_schedule("helix", ranks=2, layers=4, microbatches=4, travel="qkv")
    one = Setting(replace(SHAPE, kv_heads=2), 64, keeping=BF16)
    came = {}
    for name, sizes in {"one": {}, "tp": {"tensor_parallel": 2}, "cp": {"context_parallel": 2}}.items():
        setting = replace(one, **sizes)
        program = estimate(schedule, setting).program
        found = guests(program, 0, setting.keeping, setting.share)
        came[name] = sum(each.came_bytes for each in found.values()) // setting.group
    assert came["one"] == came["cp"] == 2 * came["tp"] > 0
