"""Where torch.distributed.pipelining has the same schedule, its order is ours, action by action."""

from __future__ import annotations

import pytest

from helixpipe.schedule.families import build_schedule

# read from torch 2.13's classes; the pages of the families say where ours differ from others of its orders
CLASSES = {
    "interleaved": "ScheduleInterleaved1F1B",
    "breadth_first": "ScheduleLoopedBFS",
    "dualpipe_v": "ScheduleDualPipeV",
}
KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_order(name: str, p: int, m: int, v: int) -> list[list[str]]:
    """What the class computes for every rank, without the stages and process group that its constructor wants."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    maker = object.__new__(getattr(schedules, name))
    maker.pp_group_size, maker._n_microbatches, maker.num_stages, maker._num_stages = p, m, p * v, p * v
    maker.n_local_stages, maker._stages, maker.rank = v, [None] * v, 0
    maker.number_of_rounds = max(1, m // p)
    maker.microbatches_per_round = m // maker.number_of_rounds
    rows = []
    for rank in range(p):
        actions = [a for a in maker._calculate_single_rank_operations(rank) if a is not None]
        single = [each for a in actions for each in (a.sub_actions or [a])]
        rows.append([f"{a.stage_index}{KINDS[a.computation_type.name]}{a.microbatch_index}" for a in single])
    return rows


@pytest.mark.parametrize(
    ("family", "p", "m", "v"),
    [
        ("interleaved", 2, 4, 2),
        ("interleaved", 4, 8, 4),
        ("interleaved", 4, 4, 3),
        ("breadth_first", 2, 3, 2),
        ("breadth_first", 4, 8, 3),
        ("dualpipe_v", 2, 4, 2),
        ("dualpipe_v", 4, 11, 2),
    ],
)
def test_torch_s_order_is_ours(family: str, p: int, m: int, v: int) -> None:
    given = {} if family == "dualpipe_v" else {"stages_per_rank": v}
    ours = build_schedule(family, ranks=p, layers=p * v, microbatches=m, **given)
    assert [[str(action) for action in order] for order in ours.ranks] == torch_order(CLASSES[family], p, m, v)
