"""One message of several tensors over gloo: as several sends, or packed into one. Seconds of both ranks' processors, and of the clock.

as they are   send send send send           recv recv recv recv
packed        copy into one buffer, send    recv, views or copies out of it
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROUNDS = 7
ALIGNED_BYTES = 64


def measure(tensors: int, each_bytes: int, messages: int) -> dict[str, float]:
    """On rank 0 of two: microseconds a message, of the clock and of both processes' processors, medians of rounds."""
    group, rank = dist.group.WORLD, dist.get_rank()
    given = [torch.full((each_bytes // 4,), float(i)) for i in range(tensors)]
    found: dict[str, list[float]] = {}
    for turn in range(-1, ROUNDS):
        for name, (send, receive) in WAYS.items():
            dist.barrier()
            begun, cpu = time.perf_counter(), time.process_time()
            for number in range(messages):
                if rank == 0:
                    send(group, given, number)
                else:
                    taken = receive(group, given, number)
                    assert float(taken[-1][0]) == tensors - 1
            took_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
            each = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
            dist.all_gather(each, torch.tensor([took_s, cpu_s], dtype=torch.float64))
            if turn >= 0:
                found.setdefault(f"{name}, clock", []).append(float(max(e[0] for e in each)) / messages * 1e6)
                found.setdefault(f"{name}, cpu", []).append(float(sum(e[1] for e in each)) / messages * 1e6)
    return {name: statistics.median(each) for name, each in found.items()}


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait(timedelta(seconds=60))


def send_each(group: Any, tensors: list[Tensor], tag: int) -> None:
    _wait([group.send([t], 1, tag * 64 + i) for i, t in enumerate(tensors)])


def receive_each(group: Any, like: list[Tensor], tag: int) -> list[Tensor]:
    found = [torch.empty_like(t) for t in like]
    _wait([group.recv([t], 0, tag * 64 + i) for i, t in enumerate(found)])
    return found


def _places(like: list[Tensor]) -> list[int]:
    """Where each begins, and the end, in elements."""
    unit, places = ALIGNED_BYTES // like[0].element_size(), [0]
    for t in like:
        places.append(-(-(places[-1] + t.numel()) // unit) * unit)
    return places


def send_packed(group: Any, tensors: list[Tensor], tag: int) -> None:
    places = _places(tensors)
    flat = tensors[0].new_empty(places[-1])
    for t, at in zip(tensors, places, strict=False):
        flat[at : at + t.numel()].copy_(t.flatten())
    _wait([group.send([flat], 1, tag)])


def receive_views(group: Any, like: list[Tensor], tag: int) -> list[Tensor]:
    places = _places(like)
    flat = like[0].new_empty(places[-1])
    _wait([group.recv([flat], 0, tag)])
    return [flat[at : at + t.numel()].view_as(t) for t, at in zip(like, places, strict=False)]


def receive_copies(group: Any, like: list[Tensor], tag: int) -> list[Tensor]:
    return [t.clone() for t in receive_views(group, like, tag)]


Way = tuple[Callable[[Any, list[Tensor], int], None], Callable[[Any, list[Tensor], int], list[Tensor]]]
WAYS: dict[str, Way] = {
    "as they are": (send_each, receive_each),
    "packed, views": (send_packed, receive_views),
    "packed, copied out": (send_packed, receive_copies),
}
