"""helix with balance="work": places by cost, of any sizes, and steps that are shorter on average."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixpipe.config_text import build_config
from helixpipe.errors import ConfigError
from helixpipe.parts.work import Batch
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule

few = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
sizes = {
    "ranks": st.integers(1, 5),
    "layers": st.integers(1, 7),
    "folds": st.integers(1, 3),
    "travel": st.sampled_from(["none", "qkv", "attention"]),
    "groups": st.sampled_from(["sequential", "forward_first"]),
}


@few
@given(st.fixed_dictionaries(sizes), st.lists(st.floats(0, 1e18), min_size=1, max_size=17))
def test_any_costs_and_sizes_make_a_schedule_that_checks(given_sizes: dict, work: list[float]) -> None:
    schedule = build_schedule("helix", microbatches=len(work), balance="work", work=tuple(work), **given_sizes)
    check(schedule)
    plain = build_schedule("helix", microbatches=len(work), **given_sizes)
    assert schedule.stages == plain.stages
    assert schedule.ranks_of == plain.ranks_of


@few
@given(st.fixed_dictionaries(sizes), st.integers(1, 17), st.floats(0, 10))
def test_where_all_cost_the_same_places_go_by_number(given_sizes: dict, microbatches: int, cost: float) -> None:
    plain = build_schedule("helix", microbatches=microbatches, **given_sizes)
    for work in ((), (cost,) * microbatches):
        found = build_schedule("helix", microbatches=microbatches, balance="work", work=work, **given_sizes)
        assert found.ranks == plain.ranks


def places(schedule: Schedule, ranks: int) -> list[tuple[int, list[int]]]:
    """Rank of layer 0's attention -> the micro-batches that it has there, in order."""
    return [(r, [a.microbatch for a in schedule.ranks[r] if a.stage == 1 and a.kind is Pass.F]) for r in range(ranks)]


def test_micro_batches_of_like_cost_are_a_group() -> None:
    found = build_schedule(
        "helix", ranks=2, layers=2, microbatches=4, folds=1, balance="work", work=(9.0, 1.0, 8.0, 2.0)
    )
    assert places(found, 2) == [
        (0, [0, 3]),
        (1, [2, 1]),
    ]  # 9 with 8, 2 with 1: of offset 1 on rank 0, of offset 0 on rank 1


def test_the_folds_of_an_offset_come_to_about_the_same() -> None:
    found = build_schedule(
        "helix", ranks=2, layers=2, microbatches=4, folds=2, balance="work", work=(9.0, 1.0, 8.0, 2.0)
    )
    assert places(found, 2) == [(0, [3, 2]), (1, [1, 0])]  # 2 + 8 and 1 + 9


def long_tailed(draw: random.Random) -> float:
    """Attention's share of a row full of documents of lognormal lengths, of what it is of one document; times 8 blocks."""
    length, filled, pairs = 131072, 0, 0
    while filled < length:
        tokens = min(int(draw.lognormvariate(7, 1.8)) + 1, length - filled)
        filled, pairs = filled + tokens, pairs + tokens**2
    return 8 * pairs / length**2


def makespan(schedule: Schedule, work: tuple[float, ...]) -> float:
    def seconds(action: Action) -> float:
        """A block is 1 and its backward, with what is recomputed, 3."""
        forward = action.kind is Pass.F
        if action.stage % 2:
            return work[action.microbatch] * (1.0 if forward else 2.5)
        return 1.0 if forward else 3.0

    return simulate_schedule(schedule, seconds).makespan_s


@pytest.mark.parametrize(
    ("ranks", "microbatches", "folds", "most"),
    [(2, 8, 1, 0.95), (2, 8, 2, 0.99), (4, 16, 1, 0.9), (4, 16, 2, 0.97), (4, 8, 2, 1.0), (8, 16, 1, 0.9), (3, 11, 2, 1.0)],
)  # fmt: skip
@pytest.mark.parametrize("groups", ["sequential", "forward_first"])
def test_on_average_a_step_is_shorter(ranks: int, microbatches: int, folds: int, most: float, groups: str) -> None:
    """Of long-tailed documents."""
    sizes = {"ranks": ranks, "layers": ranks, "microbatches": microbatches, "folds": folds, "groups": groups}
    plain, ratios = build_schedule("helix", **sizes), []
    for seed in range(8):
        draw = random.Random(seed)
        work = tuple(long_tailed(draw) for _ in range(microbatches))
        found = build_schedule("helix", balance="work", work=work, **sizes)
        ratios.append(makespan(found, work) / makespan(plain, work))
    assert statistics.mean(ratios) < most


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"balance": "cost"}, r"^schedule\.balance: 'cost' is not known; known: number, work$"),
        ({"work": (1.0,) * 4}, r"^schedule\.work: costs of micro-batches, and schedule\.balance is number; make it work$"),
        (
            {"balance": "work", "work": (1.0,)},
            r"^schedule\.work: 1 costs of 4 micro-batches; give each one's, none below 0$",
        ),
        (
            {"balance": "work", "work": (1.0, 2.0, -1.0, 0.0)},
            r"^schedule\.work: 4 costs of 4 micro-batches; give each one's, none below 0$",
        ),
    ],
)  # fmt: skip
def test_what_is_no_balance_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_schedule("helix", ranks=2, layers=2, microbatches=4, **options)


def test_a_config_places_micro_batches_by_the_pairs_of_their_documents() -> None:
    config = build_config(
        {
            "model": {"name": "tiny"},
            "schedule": {"family": "helix", "ranks": 2, "microbatches": 4, "folds": 1, "balance": "work"},
            "train": {"sequence_length": 64},
        }
    )
    batches = [Batch(1, (64,), (lengths,)) for lengths in ((64,), (8,) * 8, (60, 4), (32, 32))]
    assert config.setting().attention_costs([Batch(1, (64,))] * 2 + batches)[:3] == pytest.approx(
        [config.setting().attention_costs(batches)[0]] * 3
    )
    costs = config.setting().attention_costs(batches)
    pairs = [sum(n * n for n in batch.documents[0]) for batch in batches]
    assert [each / costs[0] for each in costs] == pytest.approx([each / pairs[0] for each in pairs])
    by_number = config.build_schedule()
    order = config.order_of_steps(by_number)
    assert order is not None
    by_work = order(batches)
    assert places(by_number, 2) == [(0, [1, 3]), (1, [0, 2])]
    assert places(by_work, 2) == [(0, [0, 3]), (1, [2, 1])]
