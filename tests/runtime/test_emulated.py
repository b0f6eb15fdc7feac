"""Rehearsals: the program's order, never faster than simulated, and nothing left behind whatever happens."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helixpipe.errors import ConfigError, RankError
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.timeline import Span
from helixpipe.runtime import emulated, forked
from helixpipe.runtime.emulated import Rehearsal, rehearse
from helixpipe.runtime.forked import run_forked
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.shape import Batch, ModelShape

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
        ("helix", {"folds": 2, "layers": 5, "microbatches": 8}),
        ("helix", {"folds": 2, "travel": "attention", "tied": True}),  # weights travel, and their gradients home
        ("seq1f1b_interleaved", {"segments": 4, "stages_per_rank": 2, "layers": 8, "microbatches": 3}),
        ("zb_v", {"layers": 8}),
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

    given = "1f1b --ranks 2 --microbatches 2 --model tiny --sequence-length 256 --seconds 0.3".split()
    assert command(given) == 0
    told = capsys.readouterr().out
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


# How it ends when something goes wrong


class Doomed(Rehearsal):
    """Rank 2 meets its fate shortly after the start."""

    fate = ""

    def run(self, rank: int, store: Any) -> tuple[Span, ...]:
        if rank == 2:
            number = {"killed": signal.SIGKILL, "silent": signal.SIGSTOP}.get(self.fate)
            if number is None:
                raise ValueError("a fault in the code")
            threading.Timer(0.4, os.kill, (os.getpid(), number)).start()
        return super().run(rank, store)


def doomed(fate: str) -> Doomed:
    program = program_of("1f1b", microbatches=40)
    job = Doomed(program.ranks, {a: 0.02 for order in program.schedule.ranks for a in order}, [0.0] * 1000, 2.0)
    job.instructions = emulated.small_instructions(program)
    job.fate = fate
    return job


def members(session: int) -> list[int]:
    """Processes of a session: the nursery's own and all that it forked."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def nurseries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of nurseries as they start, each of them a session."""
    started: list[int] = []

    class Recording(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            started.append(self.pid)

    monkeypatch.setattr(forked.subprocess, "Popen", Recording)
    return started


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("killed", r"rank 2 \(pid \d+\) was killed by SIGKILL; the other ranks are stopped"),
        (
            "silent",
            r"rank [013], at .*, waited 2 s for .* from rank \d to rank \d; rank \d was last heard of \d s ago, at .*",
        ),
        ("faulty", r"rank 2 \(pid \d+\) ended with exit code 1; the other ranks are stopped"),
    ],
)
def test_a_rank_that_is_lost_is_named_and_none_remains(fate: str, message: str, nurseries: list[int]) -> None:
    with pytest.raises(RankError) as raised:
        run_forked(doomed(fate))
    assert re.fullmatch(message, str(raised.value)), raised.value
    (nursery,) = nurseries
    assert members(nursery) == []


class Hasty(Rehearsal):
    """Durations that add up to more than they may."""

    limit_s = 3.0


def test_a_rehearsal_that_takes_too_long_ends(nurseries: list[int]) -> None:
    program = program_of("1f1b")
    job = Hasty(emulated.small_instructions(program), dict.fromkeys(program.schedule.placed, 30.0), [0.0] * 100, 60.0)
    with pytest.raises(RankError, match=r"^no end after 3 s of ranks 0, 1, 2, 3; they are stopped$"):
        run_forked(job)
    assert members(nurseries[0]) == []


CALLER = """
from helixpipe.runtime.emulated import rehearse
from test_emulated import program_of
print("here", flush=True)
rehearse(program_of("1f1b", microbatches=40), lambda action: 1.0)
"""


@pytest.mark.parametrize("gone", ["caller", "nursery"])
def test_ranks_end_with_the_caller_and_with_the_nursery(gone: str) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parent)}
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        nursery = eventually(lambda: children(caller.pid), 1)[0]
        ranks = eventually(lambda: [pid for pid in members(nursery) if pid != nursery], P)
        os.kill(caller.pid if gone == "caller" else nursery, signal.SIGKILL)
        _, told = caller.communicate(timeout=20)
        eventually(lambda: [] if members(nursery) else ["none"], 1)
    finally:
        caller.kill()
        caller.communicate()
    assert len(ranks) == P
    if gone == "nursery":
        assert "the process that starts the ranks was killed by SIGKILL before they were done; run it again" in told


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def eventually(look: Any, count: int) -> list[Any]:
    deadline = time.monotonic() + 30
    while len(found := look()) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return list(found)
