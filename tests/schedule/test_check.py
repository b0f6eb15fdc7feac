"""Every way a schedule can be wrong, and the words it is refused with."""

from __future__ import annotations

import pytest

from helixpipe.errors import ScheduleError
from helixpipe.parts.part import Part
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage
from helixpipe.schedule.text import from_csv

# two ranks, two stages, two micro-batches, right as it is
STAGES = """\
# stage 0: embed norm.0 qkv.0 attn.0 proj.0 mlp.0
# stage 1: norm.1 qkv.1 attn.1 proj.1 mlp.1 head.2
"""
RANKS = """\
0F0,0F1,0B0,0B1
1F0,1B0,1F1,1B1
"""
# one layer on two ranks: attention of micro-batch 0 on rank 1, of 1 on rank 0
TRAVELLING = """\
# stage 0: embed norm.0 qkv.0
# stage 1: attn.0
# stage 2: proj.0 mlp.0 head.1
0F0,0F1,1F1,1B1,0B1,0B0
1F0,2F0,2F1,2B1,2B0,1B0
"""
SPLIT = STAGES + "0F0,0F1,0I0,0W0,0B1\n1F0,1B0,1F1,1R1,1B1\n"

WRONG = {
    "no ranks": (STAGES, "a schedule needs at least one rank and one stage"),
    "no actions": (STAGES + '""\n', "a schedule needs at least one action"),
    "missing forward": (
        STAGES + "0F0,0B0,0B1\n1F0,1B0,1F1,1B1\n",
        "rank 0, action 0F1: missing: every stage needs a forward for every segment of every micro-batch",
    ),
    "missing everywhere": (
        STAGES + "0F0,0B0,0F1,0B1\n1F0,1B0\n",
        "action 1F1: missing: every stage needs a forward for every segment of every micro-batch",
    ),
    "missing segment": (
        STAGES + "0F0,0F0.1,0B0.1,0B0\n1F0,1B0\n",
        "action 1F0.1: missing: every stage needs a forward for every segment of every micro-batch",
    ),
    "missing backward": (
        STAGES + "0F0,0F1,0B0,0B1\n1F0,1F1,1B1\n",
        "rank 1, action 1B0: missing: every forward needs its backward, B, or I and W",
    ),
    "I without W": (
        STAGES + "0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1B1\n",
        "rank 1, action 1W0: missing: an I needs its W",
    ),
    "W without I": (
        STAGES + "0F0,0F1,0B0,0B1\n1F0,1W0,1F1,1B1\n",
        "rank 1, action 1B0: missing: every forward needs its backward, B, or I and W",
    ),
    "W beside B": (
        STAGES + "0F0,0F1,0B0,0B1\n1F0,1B0,1W0,1F1,1B1\n",
        "rank 1, action 1B0: a backward is either B, or I and W, not both; remove one",
    ),
    "I beside B": (
        STAGES + "0F0,0F1,0B0,0I0,0W0,0B1\n1F0,1B0,1F1,1B1\n",
        "rank 0, action 0B0: a backward is either B, or I and W, not both; remove one",
    ),
    "duplicated on one rank": (
        STAGES + "0F0,0F1,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n",
        "rank 0, position 3, action 0F1: duplicated: it is also on rank 0 at position 1; remove one",
    ),
    "duplicated on two ranks": (
        STAGES + "0F0,0F1,0B0,0B1\n0F0,1F0,1B0,1F1,1B1\n",
        "rank 1, position 0, action 0F0: duplicated: it is also on rank 0 at position 0; remove one",
    ),
    "unknown stage": (
        STAGES + "0F0,0F1,0B0,0B1\n1F0,1B0,2F0,1F1,1B1\n",
        "rank 1, position 2, action 2F0: there is no stage 2; stages are 0..1",
    ),
    "a stage on two ranks": (
        STAGES + "0F0,1F1,0F1,1B1,0B0,0B1\n1F0,1B0\n",
        # stage 1 has parameters; rank 1 is the second that runs it
        "rank 1, position 0, action 1F0: stage 1 (norm.1 qkv.1 attn.1 proj.1 mlp.1 head.2) has parameters and runs on "
        "ranks 0, 1; keep it on one, or give it a home from which its weights travel",
    ),
    "a backward elsewhere": (
        STAGES + "0F0,0F1,0B0\n1F0,1B0,1F1,1B1,0B1\n",
        "rank 1, position 4, action 0B1: stage 0 runs micro-batch 1 on rank 0 (0F1) and here; all passes and segments "
        "of one micro-batch share what its forward kept, so put them on one rank",
    ),
    "a segment elsewhere": (
        STAGES.replace("0:", "0 home 0:") + "0F0,0B0\n0F0.1,1F0,1F0.1,1B0.1,1B0,0B0.1\n",
        "rank 1, position 0, action 0F0.1: stage 0 runs micro-batch 0 on rank 0 (0F0) and here; all passes and "
        "segments of one micro-batch share what its forward kept, so put them on one rank",
    ),
    "home out of range": (
        STAGES.replace("1:", "1 home 2:") + RANKS,
        "stage 1 (norm.1 qkv.1 attn.1 proj.1 mlp.1 head.2) has home 2; ranks are 0..1",
    ),
    "a backward before its forward": (
        STAGES + "0B0,0F0,0F1,0B1\n1F0,1B0,1F1,1B1\n",
        "rank 0, position 0, action 0B0: needs 0F0, which comes later on the same rank, at position 1",
    ),
    "W before I": (
        SPLIT.replace("0I0,0W0", "0W0,0I0"),
        "rank 0, position 2, action 0W0: needs 0I0, which comes later on the same rank, at position 3",
    ),
    "segments out of order": (
        STAGES + "0F0.1,0F0,0B0.1,0B0\n1F0,1F0.1,1B0.1,1B0\n",
        "rank 0, position 0, action 0F0.1: needs 0F0, which comes later on the same rank, at position 1",
    ),
    "segments not reversed in backward": (
        STAGES + "0F0,0F0.1,0B0,0B0.1\n1F0,1F0.1,1B0.1,1B0\n",
        "rank 0, position 2, action 0B0: needs 0B0.1, which comes later on the same rank, at position 3",
    ),
    "R after B": (
        SPLIT.replace("1R1,1B1", "1B1,1R1"),
        "rank 1, position 3, action 1B1: 1R1 comes after the backward that would use it",
    ),
    "R before F": (
        SPLIT.replace("1F1,1R1", "1R1,1F1"),
        "rank 1, position 2, action 1R1: needs 1F1, which comes later on the same rank, at position 3",
    ),
    "two ranks wait for each other": (
        STAGES + "0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n",
        "rank 0, position 1, action 0B0: deadlock: rank 0 waits at 0B0 for 1B0, on rank 1 behind 1F1; "
        "rank 1 waits at 1F1 for 0F1, on rank 0 behind 0B0",
    ),
    "a rank that waits into a cycle": (
        # rank 2's stage waits for rank 0 and 1, which wait for each other
        "# stage 0: embed norm.0 qkv.0\n# stage 1: attn.0\n# stage 2: proj.0 mlp.0 head.1\n"
        "2F0,2B0,2F1,2B1\n0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n",
        "rank 2, position 0, action 1F1: deadlock: rank 2 waits at 1F1 for 0F1, on rank 1 behind 0B0; "
        "rank 1 waits at 0B0 for 1B0, on rank 2 behind 1F1",
    ),
    "a part in no stage": (
        STAGES.replace(" proj.0", "") + RANKS,
        "the stages do not cover the model from embed to head.2: proj.0 is in no stage",
    ),
    "a part twice": (
        STAGES.replace("mlp.0", "mlp.0 mlp.0") + RANKS,
        "the stages do not cover the model from embed to head.2: their parts repeat or are out of order",
    ),
    "stages out of order": (
        TRAVELLING.replace("attn.0", "X").replace("proj.0 mlp.0 head.1", "attn.0").replace("X", "proj.0 mlp.0 head.1"),
        "the stages do not cover the model from embed to head.1: their parts repeat or are out of order",
    ),
    "a stage without parts": (
        STAGES + "# stage 2:\n" + RANKS,
        "stage 2 has no parts; leave it out",
    ),
    "no stage with parts": ("# stage 0:\n0F0,0B0\n", "stage 0 has no parts; leave it out"),
    "a layer of which there are too many": (
        STAGES.replace("head.2", "head.999999999") + RANKS,
        "the stages do not cover the model from embed to head.999999999: norm.2 is in no stage",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_schedule_is_refused_with_where_and_why(what: str) -> None:
    text, message = WRONG[what]
    with pytest.raises(ScheduleError) as error:
        check(from_csv(text))
    assert str(error.value) == message


@pytest.mark.parametrize("text", [STAGES + RANKS, TRAVELLING, SPLIT, STAGES.replace("1:", "1 home 0:") + RANKS])
def test_a_right_schedule_passes(text: str) -> None:
    check(from_csv(text))


def test_the_error_tells_the_place_in_fields_too() -> None:
    with pytest.raises(ScheduleError) as error:
        check(from_csv(WRONG["duplicated on one rank"][0]))
    assert (error.value.rank, error.value.position, error.value.action) == (0, 3, "0F1")
    with pytest.raises(ScheduleError) as error:
        check(from_csv(WRONG["a part twice"][0]))
    assert (error.value.rank, error.value.position, error.value.action) == (None, None, None)


@pytest.mark.parametrize("family", ["gpipe", "1f1b", "helix"])
def test_any_one_action_left_out_doubled_or_moved_to_another_rank_is_noticed(family: str) -> None:
    schedule = build_schedule(family, ranks=2, layers=2, microbatches=4)
    for rank, order in enumerate(schedule.ranks):
        for at, action in enumerate(order):
            other = 1 - rank
            without = [*order[:at], *order[at + 1 :]]
            for mine, theirs in (
                (without, schedule.ranks[other]),
                ([*order, action], schedule.ranks[other]),
                (without, (*schedule.ranks[other], action)),
            ):
                ranks = (tuple(mine), tuple(theirs)) if rank == 0 else (tuple(theirs), tuple(mine))
                with pytest.raises(ScheduleError):
                    check(Schedule(schedule.stages, ranks))


def test_a_schedule_of_forwards_is_one_for_evaluation_only() -> None:
    schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=2)
    check(schedule.forward_only(), forward_only=True)
    with pytest.raises(ScheduleError, match=r"^rank 0, action 0B0: missing: every forward needs its backward"):
        check(schedule.forward_only())
    with pytest.raises(ScheduleError, match=r"^rank 0, action 0B0: a forward-only schedule has no such pass$"):
        check(schedule, forward_only=True)


def test_numbers_below_zero_are_refused() -> None:
    stages = (Stage((Part("embed", 0), Part("block", 0), Part("head", 1))),)
    right = [Action(0, Pass.F, 0), Action(0, Pass.B, 0)]
    check(Schedule(stages, (tuple(right),)))
    with pytest.raises(
        ScheduleError, match=r"^rank 0, position 2, action 0F-1: micro-batches and segments count from 0$"
    ):
        check(Schedule(stages, ((*right, Action(0, Pass.F, -1), Action(0, Pass.B, -1)),)))
