"""hp.launch: what main returns comes back, what it raises is told, and no process remains. Local ranks, and torchrun's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_forked import eventually, members

import helixpipe as hp
from helixpipe.runtime import forked, launch

pytestmark = pytest.mark.timeout(120)

ROOT = Path(hp.__file__).parents[1]
FOLDER = Path(__file__).parent


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


def summed(what: float) -> tuple[float, int, int, str]:
    """Meets the others."""
    total = torch.tensor([what + dist.get_rank()])
    dist.all_reduce(total)
    told = ",".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return float(total), dist.get_world_size(), torch.get_num_threads(), told


def fated(fate: str) -> None:
    """Rank 1 meets its fate; the others wait for it."""
    if dist.get_rank() == 1:
        if fate == "raises":
            raise ValueError("it is\nnot so")
        if fate == "leaves":
            sys.exit(3)
        if fate == "sleeps":
            time.sleep(60)
        if fate == "gives what cannot be sent":
            return
    elif fate == "gives what cannot be sent":
        return lambda: None  # type: ignore[return-value]
    dist.barrier()


def nested() -> None:
    hp.launch(summed, 1.0, ranks=2)


def test_main_runs_on_every_rank(nurseries: list[int]) -> None:
    assert hp.launch(summed, 2.0, ranks=3) == (9.0, 3, 1, "0,3,0,3")
    assert hp.launch(summed, 2.0, ranks=1, threads=2) == (2.0, 1, 2, "0,1,0,1")
    assert [members(nursery) for nursery in nurseries] == [[], []]


FAILS = "rank 1 (pid N) failed; the other ranks are stopped\n\nTraceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("fate", "begins", "ends"),
    [
        ("raises", FAILS + f'  File "{__file__}", line ', "\nValueError: it is\nnot so"),
        ("leaves", FAILS, "\nSystemExit: 3"),
        ("gives what cannot be sent", FAILS.replace("1", "0", 1), "<lambda>'"),
    ],
)
def test_the_first_to_fail_is_told(fate: str, begins: str, ends: str, nurseries: list[int]) -> None:
    """One that refuses or is killed: `test_forked` has them."""
    with pytest.raises(hp.RankError) as error:
        hp.launch(fated, fate, ranks=3, timeout_s=30)
    told = re.sub(r"pid \d+", "pid N", str(error.value))
    assert told.startswith(begins), told
    assert told.endswith(ends), told
    assert members(nurseries[0]) == []


def test_a_wait_ends(nurseries: list[int]) -> None:
    with pytest.raises(hp.RankError, match=r"(?s)^rank [02] \(pid \d+\) failed; .*in fated.*Timed out waiting 1000ms"):
        hp.launch(fated, "sleeps", ranks=3, timeout_s=1)
    with pytest.raises(hp.RankError, match=r"^no end after 1 s of ranks 0, 1, 2; they are stopped$"):
        hp.launch(fated, "sleeps", ranks=3, limit_s=1)
    assert [members(nursery) for nursery in nurseries] == [[], []]


def test_what_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(main: Any, *args: Any, **more: Any) -> str:
        with pytest.raises(hp.ConfigError) as error:
            hp.launch(main, *args, **more)
        return str(error.value)

    assert refused(summed, 1.0) == "launch: ranks None, and torchrun started none; give at least 1"
    assert refused(summed, 1.0, ranks=0) == "launch: ranks 0, and torchrun started none; give at least 1"
    told = refused(lambda: 3, ranks=2)
    assert told.startswith("launch: ranks cannot be told of ")
    assert told.endswith("; give a function at the top of a file, and arguments that pickle can write")
    assert "launch: ranks cannot be told of summed and its arguments" in refused(summed, lambda: 3, ranks=2)
    if not torch.cuda.is_available():
        told = refused(summed, 1.0, ranks=2, device="cuda")
        assert told == "device: 'cuda', and torch sees none here; use 'auto' or 'cpu'"
    with pytest.raises(hp.ConfigError, match=r"^launch: this process is in a process group already; call main itself"):
        hp.launch(nested, ranks=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert refused(summed, 1.0, ranks=2) == (
        "environment: 'LOCAL_RANK' is missing or no number; start ranks with torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, "
        "LOCAL_WORLD_SIZE"
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (
        refused(summed, 1.0, ranks=2) == "launch: ranks 2, and torchrun started 4; make them the same, or leave it away"
    )
    monkeypatch.setattr(launch, "_importing", True)
    assert refused(summed, 1.0, ranks=2).startswith(
        "launch: a rank that imports this script came upon it; call it under if "
    )


SCRIPT = """
import sys
import torch
import torch.distributed as dist
import helixpipe as hp

class Thing:
    pass

def tell(line):
    sys.stdout.write(line + "\\n")  # in one piece, beside another rank's
    sys.stdout.flush()

def main(what, thing):
    tell(f"rank {dist.get_rank()}")
    total = torch.ones(1)
    dist.all_reduce(total)
    if what == "raises" and dist.get_rank() == 1:
        raise ValueError("no")
    return float(total), type(thing).__name__
"""
GUARDED = (
    SCRIPT
    + """
if __name__ == "__main__":
    tell(str(hp.launch(main, sys.argv[1], Thing(), ranks=2, timeout_s=30)))
"""
)


def run(command: list[Any], **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=100, env=environment, check=False, **more
    )  # fmt: skip


def test_a_script_and_its_own_classes(tmp_path: Path) -> None:
    """Its ranks import it by another name; what they print is its output."""
    script = tmp_path / "script.py"
    script.write_text(GUARDED)
    done = run([script, "goes"])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["(2.0, 'Thing')", "rank 0", "rank 1"]
    failed = run([script, "raises"])
    assert failed.returncode == 1
    assert f'  File "{script}", line 19, in main' in failed.stderr
    assert failed.stderr.endswith("ValueError: no\n")
    script.write_text(SCRIPT + "hp.launch(main, 'goes', Thing(), ranks=2)\n")
    unguarded = run([script])
    assert unguarded.returncode == 1
    assert (
        "launch: a rank that imports this script came upon it; call it under if __name__ == '__main__':"
        in unguarded.stderr
    )


@pytest.mark.parametrize(
    ("command", "given", "where"),
    [(["-c", SCRIPT + "hp.launch(main, 'goes', Thing(), ranks=2)"], None, "no file"), (["-"], GUARDED, "no file")],
)
def test_a_script_that_ranks_cannot_import(command: list[str], given: str | None, where: str) -> None:
    done = run([*command, "goes"] if given else command, input=given)
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"launch: main stands in {where}, from which ranks cannot import it; put it into a file\n"
    )


def test_torchrun_starts_the_same_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(GUARDED)
    done = run(["-m", "torch.distributed.run", "--nproc-per-node", "2", script, "goes"])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == ["(2.0, 'Thing')", "(2.0, 'Thing')", "rank 0", "rank 1"]


def test_ctrl_c_ends_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    code = "import time\nfrom pathlib import Path\nimport helixpipe as hp\n\ndef main(folder):\n"
    code += "    import os\n    Path(folder, str(os.getpid())).touch()\n    time.sleep(60)\n\n"
    script.write_text(code + f"if __name__ == '__main__':\n    hp.launch(main, {str(tmp_path / 'ranks')!r}, ranks=2)\n")
    (tmp_path / "ranks").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    caller = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        ranks = [int(path.name) for path in eventually(lambda: list((tmp_path / "ranks").iterdir()), 2)]
        caller.send_signal(signal.SIGINT)
        _, told = caller.communicate(timeout=20)
    finally:
        caller.kill()
        caller.communicate()
    assert told.endswith("KeyboardInterrupt\n")
    eventually(lambda: [] if any(Path(f"/proc/{pid}").exists() for pid in ranks) else ["none"], 1)
