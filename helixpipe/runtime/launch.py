"""Launch: call a function on every rank. Ranks are started on this machine, or are those that torchrun started.

hp.launch(main, ranks=2)                        two local ranks
torchrun --nproc-per-node 2 script.py           the same script: `launch` joins the ranks it finds
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import spawn
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from helixpipe.errors import ConfigError
from helixpipe.runtime.forked import run_forked
from helixpipe.runtime.place import Place
from helixpipe.runtime.watch import starting

T = TypeVar("T")

# what a rank is told of the caller's script, so that it can import it
_TOLD = ("sys_argv", "init_main_from_name", "init_main_from_path")
_importing = False
"""Whether this process is a rank that imports the caller's script."""


def launch(
    main: Callable[..., T],
    *args: Any,
    ranks: int | None = None,
    device: str = "cpu",
    threads: int = 1,
    timeout_s: float = 300.0,
    limit_s: float = math.inf,
) -> T:
    """`main(*args)` on every rank, in a process group of all of them; what rank 0 returned.

    Where torchrun started this process, it is a rank: the group is joined, main is called here, what it returned is
    returned, and `ranks` is as many as torchrun's, or None. Everywhere else `ranks` processes are started on this machine.
    They import main by name, so it stands at the top of a file, and a script calls this under
    `if __name__ == "__main__":`. What they print is printed; their standard input is empty.

    `device`: cpu (gloo), cuda (NCCL, each rank its own device, the current one) or auto. `threads`: of each local rank.
    `timeout_s`: the longest wait for another rank. `limit_s`: all are done by then.

    Raises what a rank raised where that is an error of helixpipe's; RankError with the traceback of the rank that failed first
    for any other, and for a rank that died or took too long; ConfigError for what cannot be launched. No process remains,
    whatever happens, Ctrl-C included.
    """
    if _importing:
        raise ConfigError(
            "launch: a rank that imports this script came upon it; call it under if __name__ == '__main__':, where only the "
            "script itself does"
        )
    if dist.is_initialized():
        raise ConfigError(
            "launch: this process is in a process group already; call main itself, or launch before there is one"
        )
    if Place.is_told():
        place = Place.from_environment()
        if ranks not in (None, place.ranks):
            raise ConfigError(
                f"launch: ranks {ranks}, and torchrun started {place.ranks}; make them the same, or leave it away"
            )
        return _work(main, args, place, device, timeout_s, None)
    if ranks is None or ranks < 1:
        raise ConfigError(f"launch: ranks {ranks}, and torchrun started none; give at least 1")
    told = {name: value for name, value in spawn.get_preparation_data("rank").items() if name in _TOLD}
    if not Path(told.get("init_main_from_path", __file__)).is_file():  # a script that comes through a pipe
        del told["init_main_from_path"]
    job = Launch(ranks, _sendable(main, args, told), told, device, threads, timeout_s, limit_s)
    return run_forked(job, prints=True)[0]  # type: ignore[no-any-return]


@dataclass
class Launch:
    """The job of local ranks. `call` is main and its arguments, pickled: only a rank reads them."""

    ranks: int
    call: bytes
    told: dict[str, Any]
    device: str
    threads: int
    timeout_s: float
    limit_s: float

    def prepare(self) -> None:
        """Ranks share nothing."""

    def run(self, rank: int, store: Store) -> Any:
        place = Place(rank, self.ranks, rank, self.ranks)
        place.to_environment()
        torch.set_num_threads(self.threads)
        made = _work(*self._imported(), place, self.device, self.timeout_s, store)
        return made if rank == 0 else None

    def _imported(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """main and its arguments, here."""
        global _importing
        _importing = True
        try:
            spawn.prepare(self.told)
            main, args = pickle.loads(self.call)
        finally:
            _importing = False
        return main, args


def _work(
    main: Callable[..., T], args: tuple[Any, ...], place: Place, device: str, timeout_s: float, store: Store | None
) -> T:
    """Be a rank. No store: the environment says where ranks meet."""
    own = place.device(device, "device")
    more: dict[str, Any] = {} if store is None else {"store": store, "rank": place.rank, "world_size": place.ranks}
    with starting(place.rank):
        dist.init_process_group(place.backend(own), timeout=timedelta(seconds=timeout_s), **more)
    made = main(*args)
    dist.destroy_process_group()
    return made


def _sendable(main: Callable[..., Any], args: tuple[Any, ...], told: dict[str, Any]) -> bytes:
    """Both, pickled. Raises ConfigError where other processes could not read it."""
    name = getattr(main, "__qualname__", type(main).__name__)
    if getattr(main, "__module__", "") == "__main__" and not told.keys() & set(_TOLD[1:]):
        how = "an interactive session" if hasattr(sys, "ps1") else "no file"
        raise ConfigError(f"launch: {name} stands in {how}, from which ranks cannot import it; put it into a file")
    try:
        return pickle.dumps((main, args))
    except Exception as error:  # pickle raises what it likes
        line = " ".join(str(error).split())
        raise ConfigError(
            f"launch: ranks cannot be told of {name} and its arguments ({line}); give a function at the top of a file, and "
            "arguments that pickle can write"
        ) from None
