"""Replay: a measured step simulated from its own action times, to see what waiting and the runtime made of it."""

from __future__ import annotations

import statistics
from collections import defaultdict

from helixpipe.parts.work import Lengths, first_alike
from helixpipe.predict.estimate import Setting, per_accelerator
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.steps import step_batches
from helixpipe.predict.timeline import Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule


def replayed(schedule: Schedule, measured: Timeline, setting: Setting, documents: Lengths = ()) -> Timeline:
    """Each action takes the median of its stage, pass and segment over all micro-batches that are alike; messages are free.

    `documents`: of the measured step's rows. Micro-batches of documents are seldom alike, so there most actions take their own time.

    Bytes are those of one accelerator of a rank, which is what a run measures. So the program is that of whole
    segments, and not the one of a rank's share that ran.
    """
    batches = step_batches(setting, schedule, documents)[0]
    alike = first_alike(batches)
    taken: dict[tuple[int, Pass, int, int], list[float]] = defaultdict(list)
    for spans in measured.spans:
        for span in spans:
            stage, kind, microbatch, segment = span.action
            if microbatch < len(alike):  # a schedule of other micro-batches is told by the caller
                taken[stage, kind, alike[microbatch], segment].append(span.end_s - span.start_s)
    medians = {key: statistics.median(each) for key, each in taken.items()}

    def seconds(action: Action) -> float:
        return medians.get((action.stage, action.kind, alike[action.microbatch], action.segment), 0.0)

    program = lower(schedule, setting.shape, batches)
    return per_accelerator(
        simulate_program(program, seconds, keeping=setting.keeping, share=setting.share), setting.group
    )
