"""Runs of the commands as a user starts them, for tests: processes, and what they leave in files and on the screen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 12
CONFIG = f"""
[model]
layers = 3
hidden = 32
heads = 2
ffn = 64
[train]
steps = {STEPS}
sequence_length = 64
evaluate_every = 6
evaluate_sequences = 4
warmup_steps = 3
[run]
checkpoint_every = 3
timeline_step = 2
"""
MODULE = [sys.executable, "-m", "helixpipe", "train"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "helixpipe",
]  # fmt: skip


class Run:
    """A `helixpipe train` in a folder of its own session, its output in files."""

    def __init__(self, folder: Path, *arguments: str, command: list[str] = MODULE, config: str = CONFIG) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "small.toml").write_text(config)
        self.folder, self._out, self._err = folder, folder / "out", folder / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=folder, stdout=out, stderr=err, stdin=subprocess.DEVNULL
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, timeout_s: float = 150.0) -> int:
        return self.process.wait(timeout_s)

    def until(self, condition: Callable[[], object], timeout_s: float = 120.0, every_s: float = 0.005) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(every_s)

    def ranks(self) -> list[int]:
        """The processes of the ranks: children of torchrun, or of the launcher's nursery, which is its child."""
        return [rank for each in children(self.process.pid) for rank in children(each) or [each]]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    """Every loss of a run, training and held-out, by step."""
    return [(line["step"], line.get("loss", line.get("held_out_loss"))) for line in metrics(folder)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
