"""The compute_only CSV of torch.distributed.pipelining: a row of actions per rank, and no word on stages.

    0F0,0F1,,,0B0,,0B1             an empty cell is a rank standing idle; it means nothing here
    ,1F0,1B0,1F1,1B1               (4F2;3B0)OVERLAP_F_B is 4F2, then 3B0: so torch runs it too, unless told otherwise
    ,,2F0,2F1,2I0,2W0,2REDUCE_GRAD      the reduction over replicas is no part of a schedule: left out

There a stage is a module that the caller built, on one rank for every micro-batch. So the reader is told the
layers of the model and splits them, whole, over the stages that the rows name, as evenly as they go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from helixpipe.errors import ScheduleError, nearest
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.split import split_layers
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage

PASSES = (Pass.F, Pass.B, Pass.I, Pass.W)
MOVES = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD")
REDUCTION = "REDUCE_GRAD"  # torch's 1F1B and GPipe have it in their compute_only order
OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
LONGEST = 40  # letters; errors quote no more
CELL = re.compile(r"([0-9]{1,9})([A-Za-z_]+)([0-9]{0,9})")


def to_torch_csv(schedule: Schedule) -> str:
    """The CSV that torch's `_load_csv(file, format="compute_only")` reads; raises ScheduleError with what it cannot say."""
    _check_stages(schedule)
    for rank, order in enumerate(schedule.ranks):
        for position, action in enumerate(order):
            if action.segment:
                reason = "torch has no segments; build the schedule with segments = 1"
            elif action.kind is Pass.R:
                reason = "torch has no recompute ahead of the backward; leave R out and let the backward recompute"
            else:
                continue
            raise ScheduleError(f"{reason}, or write our own CSV", rank=rank, position=position, action=action)
    # an empty row would be read as a rank too, but not by everyone: one empty cell, quoted
    return "\n".join(",".join(map(str, order)) or '""' for order in schedule.ranks) + "\n"


def _check_stages(schedule: Schedule) -> None:
    """Every stage at home on its one rank, and reading from the stage before alone."""
    instead = "use a family that keeps its stages in place, such as 1f1b, or write our own CSV"
    for s, (stage, ranks) in enumerate(zip(schedule.stages, schedule.ranks_of, strict=True)):
        if len(ranks) > 1:
            told = f"runs on ranks {', '.join(map(str, ranks))}, and a stage of torch's on one"
        elif ranks and stage.home not in (None, *ranks):
            told = f"runs on rank {ranks[0]} and has its weights on rank {stage.home}, and torch moves none"
        elif far := [edge for edge in schedule.edges_into[s] if edge.producer != s - 1]:
            values = ", ".join(map(str, far[0].values))
            told = f"reads {values} from stage {far[0].producer}, and a stage of torch's only from the one before"
        else:
            continue
        raise ScheduleError(f"stage {s} ({stage}) {told}; {instead}")


def read_cell(cell: str, place: str) -> tuple[Action, ...]:
    """The actions of a cell of torch's that is not empty; raises ScheduleError with its place."""
    if overlapped := OVERLAP.fullmatch(cell):
        return tuple(action for half in overlapped.groups() for action in read_cell(half.strip(), place))
    match, quoted = CELL.fullmatch(cell), f"{place}: '{cell[:LONGEST]}'"
    if not match:
        advice = "; segments go with rows that name the stages" if "." in cell else ""
        raise ScheduleError(f"{quoted} is not an action of torch's; write one as '3F1'{advice}")
    stage, kind, microbatch = match.groups()
    if kind == REDUCTION and not microbatch:
        return ()
    if kind in MOVES:
        raise ScheduleError(f"{quoted} moves data, which the placement decides here; export with format='compute_only'")
    if kind not in PASSES:
        raise ScheduleError(f"{quoted} has the unknown operation '{kind[:LONGEST]}'{nearest(kind[:LONGEST], PASSES)}")
    if not microbatch:
        raise ScheduleError(f"{quoted} names no micro-batch; write one as '3F1'")
    return (Action(int(stage), Pass(kind), int(microbatch)),)


def whole_layers(orders: Sequence[Sequence[Action]], layers: int) -> tuple[Stage, ...]:
    """The stages that the rows name, with `layers` split over them; raises ScheduleError."""
    named = {action.stage for order in orders for action in order}
    if not named:
        raise ScheduleError("no actions; write a row of them for each rank, such as '0F0,0B0'")
    missing = next((stage for stage in range(len(named)) if stage not in named), None)
    if missing is not None:
        raise ScheduleError(f"stage {missing} has no action, and stage {max(named)} has; number stages from 0")
    _check_last_rank(orders)
    if layers < len(named):
        raise ScheduleError(f"layers: {layers}, and the rows name {len(named)} stages; give at least {len(named)}")
    return split_layers(layers, len(named))


def _check_last_rank(orders: Sequence[Sequence[Action]]) -> None:
    """torch 2.13's Schedule1F1B numbers the last rank's forwards from 1 in its `pipeline_order`, and runs another one."""
    first = {kind: min((a.microbatch for a in orders[-1] if a.kind is kind), default=0) for kind in (Pass.F, Pass.B)}
    if first == {Pass.F: 1, Pass.B: 0}:
        raise ScheduleError(
            f"rank {len(orders) - 1} has forwards from micro-batch 1 on and backwards from 0 on; Schedule1F1B of torch 2.13 "
            "writes that, though it runs them from 0: count these forwards from 0"
        )
