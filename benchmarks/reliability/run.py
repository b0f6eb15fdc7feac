"""Does a run survive the night? `python benchmarks/reliability/run.py --runs 200 --record record.jsonl`

Each run is a small training of 2 or 4 local ranks that is disturbed at random moments, from its first instant to its last: a rank or
the launcher is killed, asked to stop (SIGTERM), or stopped for 10 seconds. Whenever it ends before its last step the same command
line starts it again. A run holds when

    losses      of every step, and held out, are those of a run that nobody disturbed, to the last bit, each once
    ends        every attempt ends by itself, and so do all of its processes, within --limit seconds
    words       no attempt prints a traceback of this library's; one that fails says why in a line

Every second run is started by torchrun, which starts killed ranks again by itself. Runs are drawn from --seed, and each is a
line of the record, so a campaign that is cut goes on where it was.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STEPS, EVERY = 24, 4
CONFIG = f"""
[model]
layers = 4
hidden = 32
heads = 2
ffn = 64
[data]
path = "text"
[train]
steps = {STEPS}
sequence_length = 64
evaluate_every = 12
evaluate_sequences = 4
warmup_steps = 5
[run]
folder = "run"
checkpoint_every = {EVERY}
timeline_step = 2
[runtime]
timeout_s = 60
"""
LAYOUTS = {
    "pp": (2, "--schedule.family 1f1b --schedule.ranks 2"),
    "dp, sharded optimizer": (
        2, "--schedule.family 1f1b --schedule.ranks 1 --mesh.dp 2 --mesh.optimizer sharded --schedule.microbatches 2"
    ),
    "cp": (2, "--schedule.family 1f1b --schedule.ranks 1 --mesh.cp 2"),
    "tp": (2, "--schedule.family 1f1b --schedule.ranks 1 --mesh.tp 2"),
    "seq1f1b, segments": (2, "--schedule.family seq1f1b --schedule.ranks 2 --schedule.segments 2 --schedule.segment_multiple 16"),
}  # fmt: skip
PAUSE_S = 10.0
CONNECT_S = 60.0  # a rank that starts and whose launcher is gone waits so long for its store
MARK = "HELIXPIPE_CAMPAIGN"
STOPPED = 75
ATTEMPTS = 12


@dataclass(frozen=True)
class Blow:
    """One disturbance."""

    after: float
    """As a share of what an undisturbed run takes, since the run's first start."""
    signal: str
    victim: int
    """-1 the launcher, else a rank."""

    def __str__(self) -> str:
        return f"{self.signal} of {'the launcher' if self.victim < 0 else f'rank {self.victim}'} at {self.after:.2f}"


@dataclass
class Record:
    """What became of a run."""

    number: int
    layout: str
    launcher: str
    blows: list[str] = field(default_factory=list)
    landed: int = 0
    attempts: list[int] = field(default_factory=list)
    """Exit codes."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def command(layout: str, launcher: str) -> list[str]:
    ranks, options = LAYOUTS[layout]
    train = ["helixpipe", "train", "small.toml", "--resume", *options.split()]
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "--max-restarts", "3"]
        return [sys.executable, "-m", *start, "-m", *train]
    return [sys.executable, "-m", *train]


def plan(draw: random.Random, ranks: int) -> list[Blow]:
    count = draw.choice((1, 1, 2, 3))
    names = ("SIGKILL", "SIGTERM", "SIGSTOP")
    blows = [Blow(draw.uniform(0, 1.1), draw.choice(names), draw.randrange(-1, ranks)) for _ in range(count)]
    return sorted(blows, key=lambda blow: blow.after)


def marked(mark: str) -> Iterator[int]:
    """Every living process of a run, by a word of its environment."""
    word = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if (
                    word in (entry / "environ").read_bytes().split(b"\0")
                    and b") Z" not in (entry / "stat").read_bytes()
                ):
                    yield int(entry.name)
            except OSError:
                continue


def ranks_of(processes: list[int]) -> dict[int, int]:
    """Rank -> process. torchrun tells a rank its number; our own ranks are the nursery's children, in order."""
    found, nursery = {}, 0
    for process in processes:
        try:
            told = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{process}/environ").read_bytes())
            line = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if told:
            found.setdefault(int(told[1]), process)
        parent = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1]
        if b"helixpipe.runtime.nursery" in line and f"{nursery}" != parent:
            nursery = process
    if nursery:
        children = Path(f"/proc/{nursery}/task/{nursery}/children").read_text().split()
        found |= dict(enumerate(sorted(map(int, children))))
    return found


def strike(blow: Blow, launcher: int, mark: str) -> bool:
    """Whether there was somebody to strike. One who was stopped goes on by itself after a while."""
    try:
        victim = launcher if blow.victim < 0 else ranks_of(sorted(marked(mark))).get(blow.victim)
        if victim is None:
            return False
        os.kill(victim, signal.Signals[blow.signal])
    except (ProcessLookupError, FileNotFoundError):
        return False
    if blow.signal == "SIGSTOP":
        subprocess.Popen(["sh", "-c", f"sleep {PAUSE_S}; kill -CONT {victim} 2>/dev/null"])
    return True


def losses(folder: Path) -> list[tuple[int, str, float]]:
    found = []
    path = folder / "run" / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        read = json.loads(line)
        found += [(read["step"], name, read[name]) for name in ("loss", "held_out_loss") if name in read]
    return found


def attempt(
    folder: Path, line: list[str], mark: str, blows: list[Blow], clock: list[float], limit: float
) -> tuple[int, list[str]]:
    """One start of the command: its exit code, and what is wrong with how it ended. Blows that are due are dealt.

    `clock`: seconds that the run has lived in earlier attempts, and those of an undisturbed one.
    """
    faults: list[str] = []
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
    out, err = folder / "out", folder / "err"
    with out.open("w") as one, err.open("w") as other:
        process = subprocess.Popen(
            line, cwd=folder, stdout=one, stderr=other, stdin=subprocess.DEVNULL, env=environment
        )
    begun = time.monotonic()
    while process.poll() is None:
        lived = clock[0] + time.monotonic() - begun
        if blows and blows[0].after * clock[1] <= lived and strike(blows[0], process.pid, mark):
            del blows[0]
        if time.monotonic() - begun > limit:
            faults.append(f"hang: the command still runs after {limit:.0f} s")
            break
        time.sleep(0.02)
    clock[0] += time.monotonic() - begun
    patience = time.monotonic() + PAUSE_S + CONNECT_S + 30
    while (left := list(marked(mark))) and not faults and time.monotonic() < patience:
        time.sleep(0.1)
    if left and not faults:
        faults.append(f"{len(left)} processes outlive the command")
    for each in left:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
    code = process.wait(10)
    said = err.read_text(errors="replace")
    if re.search(r'File "[^"]*/helixpipe/', said):  # torchrun has one of its own for every rank that fails
        faults.append(f"a traceback: {said[-2000:]}")
    of_torchrun = "SignalException" in said  # it was asked to stop before a rank could speak
    if code > 0 and code not in (STOPPED, 130) and "helixpipe: " not in said and not of_torchrun:
        faults.append(f"exit code {code} without a word: {said[-2000:]}")
    return code, faults


def run(
    number: int,
    seed: int,
    expected: dict[str, list[tuple[int, str, float]]],
    typical: dict[tuple[str, str], float],
    limit: float,
) -> Record:
    draw = random.Random(f"{seed} {number}")
    layout, launcher = kind(number)
    record = Record(number, layout, launcher)
    blows = plan(draw, LAYOUTS[layout][0])
    record.blows = list(map(str, blows))
    planned = len(blows)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(Path(name))
        clock = [0.0, typical[layout, launcher]]
        while len(record.attempts) < ATTEMPTS:
            code, faults = attempt(folder, command(layout, launcher), f"{os.getpid()}-{number}", blows, clock, limit)
            record.attempts.append(code)
            record.faults += faults
            if code == 0 or faults:
                break
        else:
            record.faults.append(f"not done after {ATTEMPTS} attempts: {(folder / 'err').read_text()[-1000:]}")
        if not record.faults and sorted(losses(folder)) != sorted(expected[layout]):
            record.faults.append("losses differ from those of an undisturbed run")
    record.landed = planned - len(blows)
    record.seconds = round(time.monotonic() - begun, 1)
    return record


def kind(number: int) -> tuple[str, str]:
    return list(LAYOUTS)[number % len(LAYOUTS)], ("local", "torchrun")[number // len(LAYOUTS) % 2]


def prepared(folder: Path) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randrange(2, 7))) for _ in range(200)]
    (folder / "text").write_text(" ".join(draw.choices(words, k=20_000)))
    (folder / "small.toml").write_text(CONFIG)
    return folder


def undisturbed(layout: str, launcher: str, limit: float) -> tuple[list[tuple[int, str, float]], float]:
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(Path(name))
        clock = [0.0, 1.0]
        code, faults = attempt(folder, command(layout, launcher), f"{os.getpid()}-plain", [], clock, limit)
        if code or faults:
            sys.exit(
                f"an undisturbed run of {layout} by {launcher} ends with {code}: {faults or (folder / 'err').read_text()}"
            )
        return losses(folder), clock[0]


def told(records: list[dict[str, Any]]) -> str:
    lines = ["| layout | started by | runs | blows | starts | faults |", "| --- | --- | --- | --- | --- | --- |"]
    kinds = sorted({(each["layout"], each["launcher"]) for each in records})
    for layout, launcher in kinds:
        mine = [each for each in records if (each["layout"], each["launcher"]) == (layout, launcher)]
        blows, starts, faults = (sum(count) for count in zip(*(
            (each["landed"], len(each["attempts"]), len(each["faults"])) for each in mine
        ), strict=True))  # fmt: skip
        lines.append(f"| {layout} | {launcher} | {len(mine)} | {blows} | {starts} | {faults} |")
    codes = collections.Counter(code for each in records for code in each["attempts"])
    lines += ["", "exit codes: " + ", ".join(f"{code} {count} times" for code, count in sorted(codes.items()))]
    lines += [f"run {each['number']}, {each['layout']}, {each['launcher']}, {'; '.join(each['blows'])}: {fault}"
              for each in records for fault in each["faults"]]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run, to see one again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that one attempt may take")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many; 0: all")
    parser.add_argument("--record", type=Path, help="a line of JSON a run: what is in it already is not run again")
    args = parser.parse_args()
    known = args.record.read_text().splitlines() if args.record and args.record.exists() else []
    records = [json.loads(line) for line in known]
    done = {each["number"] for each in records}
    begun = time.monotonic()
    numbers = [each for each in range(args.first, args.first + args.runs) if each not in done]
    expected: dict[str, list[tuple[int, str, float]]] = {}
    typical: dict[tuple[str, str], float] = {}
    for layout, launcher in dict.fromkeys(map(kind, numbers)):
        found, typical[layout, launcher] = undisturbed(layout, launcher, args.limit)
        if expected.setdefault(layout, found) != found:
            sys.exit(f"{layout}: two undisturbed runs differ")
        print(f"{layout}, {launcher}: undisturbed {typical[layout, launcher]:.1f} s", file=sys.stderr, flush=True)
    for number in numbers:
        if args.minutes and time.monotonic() - begun > 60 * args.minutes:
            break
        record = run(number, args.seed, expected, typical, args.limit)
        records.append(asdict(record))
        if args.record:
            with args.record.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        print(
            f"run {number}: {record.layout}, {record.launcher}; {'; '.join(record.blows)}; exits {record.attempts}; "
            f"{record.seconds} s; {record.faults or 'holds'}", file=sys.stderr, flush=True,
        )  # fmt: skip
    print(told(records))
    if any(each["faults"] for each in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
