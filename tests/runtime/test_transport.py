"""Transport: pairs that meet before the first step, and what carries messages between devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_exchanges import Collectives

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.channels import Channel
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.parcel import MOST_BYTES
from helixpipe.runtime.sends import DeviceSends
from helixpipe.runtime.tensor import TensorParallel
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Kind, Message
from helixpipe.sequence import wire
from helixpipe.sequence.wire import wire_of

CPU = torch.device("cpu")
SHAPE = ModelShape(layers=8, hidden=8, heads=2, ffn=16, vocabulary=11)


def met() -> int:
    """Interleaved: the last rank's messages go to the first, so that the pairs are a circle."""
    schedule = build_schedule("interleaved", ranks=4, layers=8, microbatches=1, stages_per_rank=2)
    transport = alone(dist.group.WORLD)
    transport.meet(lower(schedule, SHAPE, Batch(1, (1,))).messages)
    transport.close()
    return transport.ledger.held.transit_bytes


def test_pairs_in_a_circle_meet(four_ranks: Ranks) -> None:
    assert four_ranks.run(met) == [0, 0, 0, 0]


def alone(group: object = None) -> Transport:
    watch = Watch(None, 0, 2)
    return Transport(group, CPU, torch.float32, torch.float32, 20.0, watch, Ledger(lambda pointer: False))  # type: ignore[arg-type]


def message(*sizes: int) -> Message:
    return Message(3, Kind.VALUES, 0, 1, None, None, ("q",) * len(sizes), tuple((1, size) for size in sizes))


def sent(*sizes: int) -> tuple[list[Any], list[torch.Tensor], set[int]] | None:
    """From rank 0 to rank 1: what the backend was called for; what came, and the bytes behind each tensor."""
    rank = dist.get_rank()
    if rank > 1:
        return None
    transport, carried = alone(dist.group.WORLD), message(*sizes)
    tensors = [torch.arange(float(size)).view(1, size) + i for i, size in enumerate(sizes)]
    with Collectives() as calls:
        if rank == 0:
            transport.send(carried, tensors)
            transport.finish()
        else:
            transport.receive(carried)
            tensors = transport.wait(carried)
    held = transport.ledger.held.transit_bytes
    assert held == 0
    transport.close()
    return calls.seen, tensors, {each.untyped_storage().nbytes() - each.nbytes for each in tensors}


@pytest.mark.parametrize(
    ("sizes", "elements"),
    [
        ((5, 3, 1), [9]),  # packed
        ((MOST_BYTES // 4,), [MOST_BYTES // 4]),  # as it is
        ((MOST_BYTES // 4, 2), [MOST_BYTES // 4, 2]),  # copies would cost more
    ],
)
def test_small_tensors_of_a_message_are_one_send(
    four_ranks: Ranks, sizes: tuple[int, ...], elements: list[int]
) -> None:
    """What comes are tensors of their own: none keeps the others' memory."""
    (calls, given, _), (posted, found, beside), *_ = four_ranks.run(sent, *sizes)
    assert calls == [("send", size) for size in elements]
    assert posted == [("recv_", size) for size in elements]
    assert beside == {0}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, found, strict=True))


class Grouped:
    """What NCCL's group is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _start_coalescing(self, device: torch.device) -> None:
        self.calls.append("start")

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.calls.append(f"send {tensors[0].numel()} to {peer}")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.calls.append(f"receive {tensors[0].numel()} from {peer}")

    def _end_coalescing(self, device: torch.device) -> SimpleNamespace:
        self.calls.append("end")
        return SimpleNamespace(wait=lambda: True, is_completed=lambda: True)


@pytest.mark.parametrize("is_own", [True, False])
def test_on_a_device_a_message_is_one_request_and_no_copy(is_own: bool) -> None:
    """Where its two ranks have a communicator of their own: on that of the whole group it would wait for all others."""
    transport, group = alone(), Grouped()
    transport._sends.close()
    transport.host, transport.tags, transport._sends = False, False, DeviceSends()
    transport._channels = SimpleNamespace(rank=0, of=lambda src, dst: Channel(group, 1, is_own))  # type: ignore[assignment]
    transport.send(message(2, 3), [torch.zeros(1, 2), torch.zeros(1, 3)])
    transport._channels.rank = 1  # type: ignore[union-attr]
    transport.receive(message(2, 3))
    works = ["send 2 to 1", "send 3 to 1"], ["receive 2 from 1", "receive 3 from 1"]
    assert group.calls == [call for each in works for call in (["start", *each, "end"] if is_own else each)]
    assert [len(flight.works) for flight in transport._receives.values()] == [1 if is_own else 2]


def group_of(**backends: str) -> SimpleNamespace:
    """A group as torch has it: one backend a kind of device."""

    def backend(device: torch.device) -> SimpleNamespace:
        if device.type not in backends:
            raise RuntimeError(f"No backend type associated with device type {device.type}")
        return SimpleNamespace(name=lambda: backends[device.type])

    return SimpleNamespace(_get_backend=backend)


@pytest.mark.parametrize(
    ("group", "device", "found"),
    [
        (group_of(cpu="gloo", cuda="nccl"), "cuda:1", "cuda:1"),  # mixed, or made without naming a backend
        (group_of(cuda="nccl"), "cuda:0", "cuda:0"),
        (group_of(cpu="gloo", cuda="gloo"), "cuda:0", "cpu"),  # gloo
        (group_of(cpu="gloo"), "cuda:0", "cpu"),
        (group_of(cpu="gloo", cuda="nccl"), "cpu", "cpu"),
        (None, "cuda:0", "cpu"),
    ],
)
def test_messages_are_made_where_the_backend_of_their_device_takes_them(group: object, device: str, found: str) -> None:
    assert wire_of(group, torch.device(device)) == torch.device(found)  # type: ignore[arg-type]


def wires() -> list[str]:
    groups = [dist.group.WORLD, dist.new_group(backend="cpu:gloo"), dist.new_group()]
    return [str(wire_of(group, torch.device(device))) for group in groups for device in ("cpu", "cuda:0")]


def test_groups_of_gloo_have_their_messages_made_on_the_host(four_ranks: Ranks) -> None:
    assert four_ranks.run(wires) == [["cpu"] * 6] * 4


def test_running_out_of_memory_is_no_lost_rank() -> None:
    """The worker has a line of its own for it."""
    transport = alone()
    tensor = TensorParallel.__new__(TensorParallel)
    for named in (
        transport._named(None, -1),
        tensor._named(),
        wire._named(None, "keys and values"),
        transport.watch.together(),
    ):
        with pytest.raises(torch.OutOfMemoryError), named:
            raise torch.OutOfMemoryError("CUDA out of memory")
