"""Meeting: the ranks of one attempt agree on a place in the store where no other attempt has written.

torchrun starts ranks anew beside the store of the attempt before, which still holds that attempt's job, its addresses and its last
words; and what it tells ranks does not always say that there was one. So they find each other by words drawn anew:

    rank r    hello/r = its word ........................ waits for welcome/<its word> = the attempt's name, says here/<name>/r
    rank 0    reads hello/r of each that is not here yet, answers at welcome/<that word>, until all are here

A word left by an earlier attempt is answered too, and nobody hears it.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

POLL_S = 0.02


def meet(store: Store, rank: int, ranks: int, timeout: timedelta) -> Store:
    """The store as only these ranks see it. Raises RuntimeError where one of them does not come in time."""
    word = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", word)
        store.wait([f"welcome/{word}"], timeout)
        name = store.get(f"welcome/{word}").decode()
        store.set(f"here/{name}/{rank}", "")
    else:
        name = word
        _welcome(store, name, ranks, timeout)
    return PrefixStore(f"helixpipe/{name}", store)


def _welcome(store: Store, name: str, ranks: int, timeout: timedelta) -> None:
    missing, answered = set(range(1, ranks)), dict[int, str]()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        missing = {rank for rank in missing if not store.check([f"here/{name}/{rank}"])}
        for rank in missing:
            if store.check([f"hello/{rank}"]) and (said := store.get(f"hello/{rank}").decode()) != answered.get(rank):
                store.set(f"welcome/{said}", name)
                answered[rank] = said
        if missing and time.monotonic() > deadline:
            told = ", ".join(map(str, sorted(missing)[:4])) + (
                f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            )
            raise RuntimeError(f"no word from rank {told} in {timeout.total_seconds():.0f} s")
        if missing:
            time.sleep(POLL_S)
