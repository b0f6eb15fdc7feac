"""Rehearsals: the program's order, never faster than simulated, messages and all."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from typing import Any

import pytest

from helixpipe.errors import ConfigError, RankError
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.timeline import Span
from helixpipe.runtime import emulated
from helixpipe.runtime.emulated import Rehearsal, rehearse
from helixpipe.runtime.forked import run_forked
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program

P = 4


def program_of(family: str, layers: int = 4, microbatches: int = 4, tied: bool = False, **options: Any) -> Program:
    schedule = build_schedule(family, ranks=P, layers=layers, microbatches=microbatches, **options)
    # 128k tokens: their tensors would not fit, and are never made
    lengths = (131072 // schedule.segments,) * schedule.segments
    shape = ModelShape(layers=layers, hidden=4096, heads=32, ffn=16384, vocabulary=50257, tied=tied)
    return lower(schedule, shape, Batch(1, lengths))


def seconds(action: Action) -> float:
    return 0.004 if action.kind is Pass.F else 0.008


@pytest.mark.parametrize(
    ("family", "options"),
    [
        # weights travel, and their gradients home
        ("helix", {"folds": 2, "travel": "attention", "tied": True, "layers": 5, "microbatches": 9}),
        ("seq1f1b_interleaved", {"segments": 4, "stages_per_rank": 2, "layers": 8, "microbatches": 3}),
    ],
)
def test_what_is_rehearsed_is_the_program(family: str, options: dict[str, Any]) -> None:
    program = program_of(family, **options)
    timeline = rehearse(program, seconds, timeout_s=20)
    assert timeline.order == program.schedule.ranks
    simulated = simulate_program(program, seconds)
    assert timeline.makespan_s >= simulated.makespan_s
    for spans in timeline.spans:
        ends = [0.0] + [span.end_s for span in spans]
        assert all(span.start_s >= end for span, end in zip(spans, ends, strict=False))  # from one origin, and in order
        assert all(span.end_s - span.start_s >= seconds(span.action) for span in spans)
    end_s = {span.action: span.end_s for spans in timeline.spans for span in spans}
    for spans in timeline.spans:  # on one clock: nothing starts before what it reads has been made
        for span in spans:
            assert all(span.start_s >= end_s[needed] for needed in program.schedule.dependencies(span.action))


def test_messages_take_their_modelled_time_and_wait_for_the_link() -> None:
    """gpipe on two ranks: four forwards of nothing, whose messages take 50 ms each on the one link between them."""
    schedule = build_schedule("gpipe", ranks=2, layers=2, microbatches=4)
    shape = ModelShape(layers=2, hidden=8, heads=1, ffn=8, vocabulary=5)
    program = lower(schedule, shape, Batch(1, (4,)))
    timeline = rehearse(program, lambda action: 0.0, lambda message: 0.05, timeout_s=20)
    starts = [span.start_s for span in timeline.spans[1] if span.action.kind is Pass.F]
    assert all(start >= 0.05 * count for count, start in enumerate(starts, start=1))
    assert timeline.spans[1][0].awaited == "x.1 of 0F0 from rank 0 to rank 1"
    assert timeline.makespan_s >= simulate_program(program, lambda action: 0.0, lambda message: 0.05).makespan_s


def test_the_command_reports_both(capsys: pytest.CaptureFixture[str]) -> None:
    from helixpipe.commands.rehearse import rehearse as command

    given = "1f1b --ranks 2 --microbatches 2 --model tiny --sequence-length 256 --seconds 0.3"
    assert command(given.split()) == 0
    told = capsys.readouterr().out
    assert told.startswith("1f1b: 2 ranks, 2 micro-batches; ideal, link free\n")
    assert "instruction order equal on every rank" in told
    step = re.search(r"step +(\S+) s +(\S+) s +ratio (\S+)", told)
    assert step is not None
    assert float(step[1]) == pytest.approx(0.3, abs=5e-4)
    assert float(step[2]) >= float(step[1])
    assert float(step[3]) == pytest.approx(float(step[2]) / float(step[1]), rel=0.01)
    assert len(re.findall(r"^rank \d", told, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seconds 0", r"--seconds: 0; give more than 0"),
        ("--ranks 300", r"--ranks: 300 processes are more than one machine is asked for; give at most 256"),
    ],
)
def test_the_command_refuses(flags: str, message: str) -> None:
    from helixpipe.commands.rehearse import rehearse as command

    with pytest.raises(ConfigError, match=message):
        command(f"1f1b --ranks 2 --microbatches 2 --model tiny --sequence-length 256 {flags}".split())


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_time_is_finite_and_not_below_0(bad: float) -> None:
    program = program_of("1f1b")
    told = rf"^rehearse: 0F0 takes {bad} s; give finite seconds from 0 up$"
    with pytest.raises(ConfigError, match=told):
        rehearse(program, lambda action: bad)
    with pytest.raises(ConfigError, match=rf"^rehearse: x\.1 of 0F0 from rank 0 to rank 1 takes {bad} s; "):
        rehearse(program, seconds, lambda message: bad)


class Silent(Rehearsal):
    """Rank 2 stops shortly after the start, and says nothing more."""

    def run(self, rank: int, store: Any) -> tuple[Span, ...]:
        if rank == 2:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return super().run(rank, store)


def test_who_waits_too_long_says_for_what() -> None:
    program = program_of("1f1b", microbatches=40)
    seconds = dict.fromkeys(program.schedule.placed, 0.02)
    with pytest.raises(RankError) as raised:
        run_forked(Silent(emulated.small_instructions(program), seconds, [0.0] * len(program.messages), timeout_s=2.0))
    told = str(raised.value)
    what = r"waited [23] s for x\.\d of \d[FB]\d+ from rank \d to rank \d"
    pattern = rf"rank [013], at .*, {what}; rank \d was last heard of \d s ago, at .*; silent since: rank 2"
    assert re.fullmatch(pattern, told), told
