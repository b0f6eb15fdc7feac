"""Watch: what is told of a rank, also when the store that was asked is gone."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future

import pytest
import torch.distributed as dist

from helixpipe.errors import RankError
from helixpipe.runtime.watch import Watch


def test_a_store_that_is_gone_does_not_hide_the_error() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = Watch(dist.TCPStore("127.0.0.1", server.port, is_master=False), 0, 2)
    try:
        assert re.fullmatch(r"rank 0 was last heard of \d+ s ago, at its first step", watch.told(0))
        assert watch.told(1) == "rank 1 was never heard of"
        del server
        gone = "rank 1 cannot be asked about: the run's store is gone too"
        assert watch.told(1) == gone
        assert str(watch.placed(RankError("lost a rank"))) == f"rank 0, at its first step, lost a rank; {gone}"
    finally:
        watch.close()


def test_a_store_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    class Silent(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            return answers.wait(30)

    monkeypatch.setattr("helixpipe.runtime.watch.PATIENCE_S", 0.05)
    watch = Watch(Silent(), 0, 3)
    try:
        assert watch.others() == "rank 1 and rank 2 cannot be asked about: the run's store is gone too"
    finally:
        answers.set()
        watch.close()


def test_a_long_wait_ends_when_a_rank_is_not_heard_of_any_more() -> None:
    store = dist.HashStore()
    watch, other = Watch(store, 0, 3), Watch(store, 1, 3)
    store.set("watch/2", "0 asleep")  # and never again
    watch.doing = "the checkpoint of step 8"
    try:
        said = (
            r"rank 0, at the checkpoint of step 8, heard nothing of rank 2 for 2 s; "
            r"rank 1 was last heard of \d+ s ago, at its first step; rank 2 was last heard of \d+ s ago, at asleep"
        )
        with pytest.raises(RankError, match=said):
            watch.patient(Future[int](), 2.0)
        done = Future[int]()
        done.set_result(3)
        assert watch.patient(done, 2.0) == 3
        timed_out = Future[int]()
        timed_out.set_exception(TimeoutError("of its own"))
        with pytest.raises(TimeoutError, match="of its own"):
            watch.patient(timed_out, 2.0)
    finally:
        watch.close()
        other.close()


def test_a_long_wait_ends_when_the_store_does_not_answer_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(dist.HashStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            raise RuntimeError("gone")

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("gone")

    watch = Watch(Silent(), 0, 2)
    try:
        with pytest.raises(RankError, match="heard nothing of the run's store for 0 s; rank 1 cannot be asked about"):
            watch.patient(Future[int](), 0.2)
    finally:
        watch.close()
