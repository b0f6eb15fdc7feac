"""What sequence parallelism says to other ranks: around a ring, all to all, a sum, alike on gloo and NCCL.

gloo moves host memory only: tensors of a device are staged through it. NCCL has no tags and matches a pair's
messages by order, so every rank posts the same exchanges in the same order, sends and receives of one together.
One group serves all rings, so nothing has to be made: hops of two rings share NCCL's communicator and its order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.errors import RankError

Group = dist.ProcessGroup | None
"""None is this process alone."""


def size_of(group: Group) -> int:
    return dist.get_world_size(group) if group is not None else 1


def rank_of(group: Group) -> int:
    return dist.get_rank(group) if group is not None else 0


def wire_of(group: Group, device: torch.device) -> torch.device:
    """Where a group's messages of a device's tensors are made: the device, or the host where gloo serves it.

    Asked of the group's own backend for the device, since a group may have several, or be made without naming any.
    """
    host = torch.device("cpu")
    if group is None or device.type == "cpu":
        return host
    try:
        backend = group._get_backend(device).name()
    except RuntimeError:  # none that serves this device
        return host
    return host if backend == "gloo" else device


class Peers:
    """Some ranks of a group in an order, this one among them: a ring, or those that exchange pieces."""

    def __init__(self, group: Group, members: Sequence[int]) -> None:
        self.group, self.members, self.size = group, tuple(members), len(members)
        self.index = self.members.index(rank_of(group))

    def pass_on(self, tensors: Sequence[Tensor], what: str, tag: int = 0, hops: int = 1) -> Passing:
        """Ours to the next in the ring, those of the one before to us. They travel while this rank computes.

        Several may be under way, with tags of their own. `hops`: to whom, and from whom; below 0 is back.
        """
        after, before = (self.members[(self.index + way) % self.size] for way in (hops, -hops))
        sent = [_wired(tensor, self.group) for tensor in tensors]
        coming = [torch.empty_like(tensor) for tensor in sent]
        exchange = Passing(self.group, coming, tensors[0].device, f"{what} from rank {before}")
        exchange.post([(t, after) for t in sent], [(t, before) for t in coming], tag)
        return exchange

    def all_to_all(self, x: Tensor, sent: Sequence[int] | None, received: Sequence[int] | None) -> Tensor:
        """Pieces of dim 0, one to each, for the pieces that they have for us; in their order. No gradient.

        `sent` and `received` are the pieces' sizes; None: equal ones.
        """
        wire = _wired(x, self.group)
        sent = sent or [len(wire) // self.size] * self.size
        received = received or sent
        out = wire.new_empty(sum(received), *wire.shape[1:])
        sends, receives = [], []
        for i, (ours, theirs) in enumerate(zip(wire.split(sent), out.split(received), strict=True)):
            if i == self.index:
                theirs.copy_(ours)
                continue
            sends += [(ours, self.members[i])] * (len(ours) > 0)
            receives += [(theirs, self.members[i])] * (len(theirs) > 0)
        exchange = Passing(self.group, [out], x.device, f"pieces from ranks {list(self.members)}")
        exchange.post(sends, receives)
        return exchange.wait()[0]


class Passing:
    """Messages under way, to and from other ranks."""

    def __init__(self, group: Group, coming: list[Tensor], device: torch.device, what: str) -> None:
        self._group, self._coming, self._device, self._what = group, coming, device, what
        self._sent: Sequence[tuple[Tensor, int]] = ()
        self._works: list[Any] = []

    def post(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int = 0) -> None:
        """(tensor, rank of the group) each; the n-th of a pair meets the n-th."""
        self._sent = sends  # held until they have gone
        found = []
        for function, messages in ((dist.isend, sends), (dist.irecv, receives)):
            earlier = Counter[int]()
            for tensor, peer in messages:
                at = tag + earlier[peer]
                found.append(dist.P2POp(function, tensor, group=self._group, tag=at, group_peer=peer))
                earlier[peer] += 1
        if found:
            with _named(self._group, self._what):
                self._works = dist.batch_isend_irecv(found)

    def wait(self) -> list[Tensor]:
        """What came. What was sent may go."""
        with _named(self._group, self._what):
            for work in self._works:
                work.wait()
        self._sent = ()
        return [tensor.to(self._device) for tensor in self._coming]


def all_gather(x: Tensor, group: Group) -> list[Tensor]:
    """Every rank's tensor, by rank. No gradient."""
    if group is None:
        return [x]
    wire = _wired(x, group)
    found = [torch.empty_like(wire) for _ in range(size_of(group))]
    with _named(group, "the shards of its sequence"):
        dist.all_gather(found, wire, group=group)
    return [each.to(x.device) for each in found]


def all_sum(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, a new tensor. No gradient."""
    wire = _wired(x.clone(), group)
    if group is not None:
        with _named(group, "the sum over its sequence"):
            dist.all_reduce(wire, group=group)
    return wire.to(x.device)


class Exchange(torch.autograd.Function):
    """`Peers.all_to_all` with a gradient: the same the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, sent: Any = None, received: Any = None) -> Tensor:
        ctx.peers, ctx.sent, ctx.received = peers, sent, received
        return peers.all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.peers.all_to_all(grad, ctx.received, ctx.sent), None, None, None


class Sum(torch.autograd.Function):
    """`all_sum` with a gradient: every rank uses the sum, so what it is owed is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_sum(grad, ctx.group), None


def _wired(tensor: Tensor, group: Group) -> Tensor:
    """As the backend can send it."""
    return (tensor if group is None else tensor.to(wire_of(group, tensor.device))).contiguous()


@contextmanager
def _named(group: Group, what: str) -> Iterator[None]:
    """Whatever the backend says of a failure becomes who waited for what, and how long."""
    begun = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # no other rank's doing
    except RuntimeError as error:
        waited_s = time.monotonic() - begun
        raise RankError(
            f"rank {rank_of(group)} of {size_of(group)} got no {what}, after {waited_s:.0f} s: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
