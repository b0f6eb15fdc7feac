"""What a step costs the host beside its kernels. `python benchmarks/host_work/run.py exchanges messages ...`; nothing is all.

Each question is a file of this folder. One thread and one core a rank; the processors' seconds stand beside the clock's, since
others may run here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import launch, machine

CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": {"family": "1f1b", "ranks": 2}, "model": {}, "mesh": {}},
    "helix, qkv travels, tied": {
        "schedule": {"family": "helix", "ranks": 2, "travel": "qkv"}, "model": {"tied": True}, "mesh": {},
    },
    "1f1b, dp 2": {"schedule": {"family": "1f1b", "ranks": 2}, "model": {}, "mesh": {"dp": 2}},
}  # fmt: skip


def _exchanges(rank: int, case: dict[str, Any], path: str) -> None:
    from exchanges import count

    found = count(rank, **case)
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def _messages(rank: int, path: str) -> None:
    from messages import measure

    found = {
        f"{tensors} x {size:,} bytes": measure(tensors, size, messages)
        for tensors in (2, 4, 12)
        for size, messages in ((64, 400), (4096, 400), (2**16, 200), (2**18, 100), (2**20, 40), (2**22, 15))
    }
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def told(function: Callable[..., None], ranks: int, *args: Any) -> Any:
    """What rank 0 of some local ranks leaves in a file."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        launch(ranks, function, *args, file.name)
        return json.loads(Path(file.name).read_text())


def exchanges() -> None:
    for name, case in CASES.items():
        found = told(_exchanges, 2 * case["mesh"].get("dp", 1), case)
        print(f"{name}: on rank 0, a training step")
        for what, each in found.items():
            print(f"  {what}: " + ", ".join(f"{key} {value:g}" for key, value in sorted(each.items())))


def messages() -> None:
    for name, each in told(_messages, 2).items():
        print(f"{name}: " + "; ".join(f"{way} {value:.0f} us" for way, value in each.items()))


def _actions(rank: int, path: str) -> None:
    from actions import overhead

    found = overhead(rank)
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def actions() -> None:
    print("rank 0 of 2, milliseconds an action")
    for name, each in told(_actions, 2).items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in each.items()))


def alone() -> None:
    from alone import measure

    torch.set_num_threads(1)
    print("microseconds: " + ", ".join(f"{key} {value:.0f}" for key, value in measure().items()))


def between() -> None:
    from between import measure

    torch.set_num_threads(1)
    for rank in (0, 15, 31):
        print(f"rank {rank} of 32, milliseconds: " + ", ".join(f"{key} {n:.4g}" for key, n in measure(rank).items()))


def garbage() -> None:
    from garbage import measure

    torch.set_num_threads(1)
    print("20 steps: " + ", ".join(f"{key} {value}" for key, value in measure(20).items()))


QUESTIONS: dict[str, Callable[[], None]] = {
    "exchanges": exchanges, "messages": messages, "actions": actions, "alone": alone,
    "between": between, "garbage": garbage,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="which to answer [all]")
    asked = parser.parse_args().questions or list(QUESTIONS)
    print(machine())
    for question in asked:
        print(f"\n{question}")
        QUESTIONS[question]()
