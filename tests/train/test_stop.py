"""How a run hears that it should end, who may write to its folder, and how ranks of one attempt find each other."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import socket
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from helixpipe.config import Config
from helixpipe.errors import ConfigError
from helixpipe.train.job import Job
from helixpipe.train.lock import claimed
from helixpipe.train.meeting import meet
from helixpipe.train.stop import SIGNALS, Stop

pytestmark = pytest.mark.timeout(60)
SOON = timedelta(seconds=10)


def job(folder: Path, **more: bool) -> Job:
    config = Config()
    return Job(dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(folder))), None, 0, **more)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_and_handlers_are_as_before(number: signal.Signals) -> None:
    before, stop = signal.getsignal(number), Stop()
    with stop.listening():
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once_and_a_second_warning_does_not() -> None:
    stop = Stop()
    with stop.listening():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_came_while_the_process_started_is_heard() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.raise_signal(signal.SIGTERM)
    stop = Stop()
    with stop.listening():
        assert stop.asked == signal.SIGTERM


def test_a_folder_has_one_writer_who_is_named(tmp_path: Path) -> None:
    with claimed(job(tmp_path / "a" / "b")) as mine:
        assert mine.folder.is_dir()
        with pytest.raises(ConfigError) as caught, claimed(job(tmp_path / "a" / "b")):
            pass
        assert str(caught.value) == (
            f"run.folder: '{tmp_path}/a/b' is in use by process {os.getpid()} on {socket.gethostname()}; "
            "wait for it or stop it, or choose another folder"
        )
        assert (tmp_path / "a" / "b" / "lock").exists()
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_folder_with_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    with claimed(job(tmp_path / "run")) as mine:
        (mine.folder / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="has a run already"), claimed(job(tmp_path / "run")):
        pass
    with claimed(job(tmp_path / "run", afresh=True)):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_a_numbered_folder_gives_way_to_the_next(tmp_path: Path) -> None:
    first = job(tmp_path / "small-1", numbered=True)
    with claimed(first) as one, claimed(first) as two:
        assert (one.folder.name, two.folder.name) == ("small-1", "small-2")
        (one.folder / "config.toml").write_text("")
    with claimed(first) as three:  # whoever had it ended, and left a run
        assert three.folder.name == "small-2"


def test_a_lock_that_its_holder_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, removed = fcntl.flock, []

    def after_removal(held: int, how: int) -> None:
        if not removed:
            removed.append(held)
            (tmp_path / "run" / "lock").unlink()
        flock(held, how)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with claimed(job(tmp_path / "run")):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(held: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with claimed(job(tmp_path / "run")) as mine:
        assert mine.folder.is_dir()


def together(store: dist.Store, ranks: int) -> list[dist.Store]:
    found: list[dist.Store] = [store] * ranks

    def come(rank: int) -> None:
        found[rank] = meet(store, rank, ranks, SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(ranks)]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_ranks_of_an_attempt_meet_and_see_nothing_of_the_one_before() -> None:
    store = dist.HashStore()
    before = together(store, 3)
    before[0].set("job", "old")
    assert before[2].get("job") == b"old"
    store.set("hello/1", "a rank that was killed before it was welcomed")
    after = together(store, 3)
    assert not after[1].check(["job"])
    after[0].set("job", "new")
    assert [each.get("job") for each in (after[1], after[2], before[1])] == [b"new", b"new", b"old"]


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"^no word from rank 1, 2, 3, 4 and 2 more in 0 s$"):
        meet(dist.HashStore(), 0, 7, timedelta(seconds=0.1))
