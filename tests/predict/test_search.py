"""The search over meshes: what it never simulates is provably no better, and every bound is one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping
from helixpipe.predict import search as module
from helixpipe.predict.bounds import PolicyBound, makespan_of_order, peak_of_order
from helixpipe.predict.candidates import CONSTRUCTED, RECOMPUTE, Candidate, chunk_sizes, setting_of, together
from helixpipe.predict.cost import action_seconds
from helixpipe.predict.estimate import Setting, priced
from helixpipe.predict.hardware import Link, named_accelerator
from helixpipe.predict.layouts import Asked, layouts
from helixpipe.predict.nodes import Nodes
from helixpipe.predict.refine import Task, estimate_row, refine
from helixpipe.predict.search import Row, placed, schedules_of, search
from helixpipe.predict.steps import figures
from helixpipe.schedule import families
from helixpipe.schedule.lower import lower

SHAPE = ModelShape(layers=4, hidden=512, heads=4, kv_heads=2, ffn=1024, vocabulary=4096)
INSIDE, ACROSS = Link("inside", 1e11, 1e-6, "made up"), Link("across", 5e9, 1e-5, "made up")
SETTING = Setting(SHAPE, 8192, named_accelerator("h100"), ACROSS, Keeping("none", 2, device="cuda"))
ASKED = Asked(
    SETTING, 4, 2, math.inf, Nodes(2, INSIDE, ACROSS), cp=1, microbatch_size=1, families=("1f1b", "interleaved", "zb_v")
)  # fmt: skip


def everything(asked: Asked) -> list[Row]:
    """All layouts, schedules and policies, simulated; and each held to its bounds."""
    rows = []
    for layout in layouts(asked).layouts:
        bare = layout.setting(asked)
        for candidate, recompute, chunk in itertools.product(
            schedules_of(asked, layout), RECOMPUTE, chunk_sizes(bare.sequence_length, layout.mesh.cp)
        ):
            candidate = candidate._replace(recompute=recompute, chunk=chunk)
            setting, m = setting_of(bare, candidate), layout.microbatches
            try:
                batch = setting.batch(dict(candidate.options).get("segments", 1))
                schedule = setting.build(candidate.family, layout.mesh.pp, m, **dict(candidate.options))
            except (ConfigError, ScheduleError):
                continue
            found = figures([priced(lower(schedule, SHAPE, batch), setting)])
            row = Row(layout, candidate, found)
            rows.append(row)
            policy, small = PolicyBound(setting, layout.mesh.pp, m), placed(setting, layout, candidate)
            bounds = [
                policy.bound,
                policy.of_placement(small, batch, together(candidate, layout.mesh.pp, m)),
            ]
            for bound in bounds:
                assert bound.step_s <= row.step_s, row
                assert bound.peak_bytes <= row.peak_bytes, row
            assert (
                peak_of_order(schedule, small.standing(setting), batch, policy.kept_of_stages(small)) <= row.peak_bytes
            ), row
            seconds = action_seconds(schedule, SHAPE, batch, setting.costs, setting.keeping)
            assert makespan_of_order(schedule, seconds) + small.reduction_s(setting) <= row.step_s, row
    return rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return everything(ASKED)


def best_of(rows: list[Row], memory_bytes: float, top: int) -> list[Row]:
    """Each mesh's best, fastest first."""
    found: dict[tuple[int, ...], Row] = {}
    for row in sorted(rows, key=module._rank):
        if row.peak_bytes <= memory_bytes:
            found.setdefault(row.layout.key, row)
    return list(found.values())[:top]


def test_the_answer_is_that_of_trying_everything(rows: list[Row]) -> None:
    peaks = sorted(row.peak_bytes for row in rows)
    for memory_bytes, top in ((math.inf, 3), (peaks[len(peaks) // 20], 1), (math.inf, 99)):
        found = search(replace(ASKED, memory_bytes=memory_bytes), top)
        assert list(found.rows) == best_of(rows, memory_bytes, top)
        assert found.simulated < len(rows)


def test_what_is_let_go_is_faster_by_no_more_than_it_says(rows: list[Row]) -> None:
    exact = search(ASKED)
    found = search(ASKED, patience=64)
    assert exact.within == 0
    assert 0.01 <= found.within <= 0.5
    assert found.simulated < exact.simulated
    assert found.rows[0].step_s * (1 - found.within) <= exact.rows[0].step_s == best_of(rows, math.inf, 1)[0].step_s


def test_every_family_keeps_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one mesh, head and embedding on all ranks or not."""
    for name, values in (("SEGMENTS", (4,)), ("STAGES_PER_RANK", (2,)), ("EVENNESS", (0.0,))):
        monkeypatch.setattr(f"helixpipe.predict.candidates.{name}", values)
    others = tuple(name for name in families.FAMILIES if name not in (*ASKED.families, "constructed"))
    asked = replace(ASKED, sequences=4, pp=2, dp=1, tp=2, families=others)
    found = everything(replace(asked, setting=replace(SETTING, sequence_length=2048)))
    assert {row.candidate.family for row in found} == set(others)
    assert {dict(row.candidate.options).get("vocabulary", "last") for row in found} == {"last", "spread"}


def test_a_model_whose_layers_differ_keeps_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixpipe.predict.candidates.SEGMENTS", (4,))
    shape = replace(SHAPE, window=512, window_pattern=(True, False), tied=True)
    setting = Setting(shape, 4096, named_accelerator("h100"), ACROSS, Keeping("none", 2, device="cuda"))
    asked = Asked(setting, 2, 2, math.inf, Nodes(2, INSIDE, ACROSS), pp=2, families=("seq1f1b", "helix"))
    for layout in layouts(asked).layouts:
        for candidate in schedules_of(asked, layout):
            mine = setting_of(layout.setting(asked), candidate)
            batch = mine.batch(dict(candidate.options).get("segments", 1))
            schedule = mine.build(candidate.family, 2, layout.microbatches, **dict(candidate.options))
            found = figures([priced(lower(schedule, shape, batch), mine)])
            policy, small = PolicyBound(mine, 2, layout.microbatches), placed(mine, layout, candidate)
            bound = policy.of_placement(small, batch, together(candidate, 2, layout.microbatches))
            assert bound.step_s <= found.step_s
            assert bound.peak_bytes <= found.peak_bytes


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name != CONSTRUCTED])
def test_stages_of_a_vocabulary_on_all_ranks_are_known_without_its_order(family: str) -> None:
    """Though it weighs nothing at the ends of a pipeline there, so that layers are cut otherwise than with a whole head."""
    asked = replace(ASKED, sequences=8, pp=2, tp=2, setting=replace(SETTING, shape=replace(SHAPE, vocabulary=65536)))
    [layout] = layouts(asked).layouts
    v = (("stages_per_rank", 2),) if "stages_per_rank" in families.options(family) else ()
    candidate = Candidate(family, (*v, ("vocabulary", "spread")), recompute="none")
    setting = setting_of(layout.setting(asked), candidate)
    small = placed(setting, layout, candidate).schedule
    whole = setting.build(family, 2, layout.microbatches, **dict(candidate.options))
    assert (small.stages, small.ranks_of) == (whole.stages, whole.ranks_of)


def test_layouts_of_any_number_are_found_at_once() -> None:
    """All ways to write a number as four factors may be millions, and its divisors take as long to find as it is large."""
    for accelerators in (1_000_003, 735_134_400, 10**12):
        found = layouts(replace(ASKED, accelerators=accelerators, cp=None))
        assert not found.layouts
        assert found.why.startswith(("pp ", "batch: 2 sequences do not divide over dp ", "mesh.tp: "))
    for sizes, why in (
        ({"tp": 3}, "cp 1 x tp 3 does not divide them"), ({"pp": 2, "dp": 1, "tp": 1}, "pp 2 x dp 1 x cp 1 x tp 1 are 2"),
        ({"pp": 1, "dp": 4}, "batch: 2 sequences do not divide over dp 4"), ({"tp": 4}, "mesh.tp: 4 ranks do not divide model.kv_heads 2"),
    ):  # fmt: skip
        assert layouts(replace(ASKED, **sizes)).why.startswith(why)


def test_a_row_is_what_its_estimate_says() -> None:
    """An order that is built from costs was shared among policies, whose costs differ: training would build another one."""
    asked = replace(ASKED, sequences=16, pp=4)
    [layout] = layouts(asked).layouts
    for recompute in ("none", "full"):
        candidate = Candidate("1f1b", (("vocabulary", "spread"),), recompute=recompute)
        row = refine(Task(asked, layout, candidate, math.inf)).row
        assert row is not None
        assert row.step_s == estimate_row(asked, row).step_s


def test_an_order_that_may_put_weight_gradients_off_is_bounded_as_if_it_did() -> None:
    """Of few micro-batches whole backwards may be shorter, and of many they may not."""
    asked = replace(ASKED, pp=4)
    [layout] = layouts(asked).layouts
    candidate = Candidate(CONSTRUCTED, (), recompute="full")
    small = placed(setting_of(layout.setting(asked), candidate), layout, candidate)
    assert small.splits
    assert not replace(small, may_split=False).splits


def test_processes_find_the_same() -> None:
    asked = replace(ASKED, families=("1f1b",))
    assert search(asked, 3, processes=2).rows == search(asked, 3).rows


def test_directions_that_are_given_stay() -> None:
    asked = replace(ASKED, tp=2, cp=None, families=("1f1b",))
    assert {layout.mesh.tp for layout in layouts(asked).layouts} == {2}
    (layout,) = layouts(replace(asked, tp=1, dp=2, cp=2, context_method="ulysses", optimizer="sharded")).layouts
    assert (layout.mesh.cp, layout.mesh.context_method, layout.optimizer) == (2, "ulysses", "sharded")
    assert str(layout) == "dp 2 x cp 2"
    assert layout.told == ["ulysses", "optimizer sharded"]


def test_one_pipeline_rank_is_no_family() -> None:
    found = search(replace(ASKED, pp=1), 1).rows[0]
    assert found.schedule_told.startswith("no pipeline, ")


def test_progress_ends() -> None:
    told: list[tuple[int, int]] = []
    search(replace(ASKED, families=("1f1b",)), 2, progress=lambda done, left: told.append((done, left)))
    assert told[-1][1] == 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_when_nothing_fits_the_nearest_is_told() -> None:
    found = search(replace(ASKED, memory_bytes=1e6), 1)
    assert found.rows == ()
    assert found.least_bytes > 1e6
    assert found.least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accelerators": 0}, "accelerators: 0; give at least 1"),
        ({"sequences": 0}, "sequences: 0; give at least 1"),
        ({"tp": 0}, "tp: 0; give at least 1"),
        ({"tp": 3}, "accelerators: no layout of 4 can be: cp 1 x tp 3 does not divide them"),
        ({"pp": 2, "dp": 1, "tp": 1}, "accelerators: no layout of 4 can be: pp 2 x dp 1 x cp 1 x tp 1 are 2"),
        ({"families": ("1f2b",)}, "schedule.family: '1f2b' is not known; did you mean '1f1b'?"),
        ({"accelerators": 5, "pp": 1, "cp": 1, "tp": 1}, "accelerators: no layout of 5 can be: batch: 2 sequences do not divide over dp 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(replace(ASKED, **change))  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
