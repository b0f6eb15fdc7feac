"""Transport: pairs that meet before the first step, and what carries messages between devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.tensor import TensorParallel
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.sequence import wire
from helixpipe.sequence.wire import wire_of

SHAPE = ModelShape(layers=8, hidden=8, heads=2, ffn=16, vocabulary=11)


def met() -> int:
    """Interleaved: the last rank's messages go to the first, so that the pairs are a circle."""
    schedule = build_schedule("interleaved", ranks=4, layers=8, microbatches=1, stages_per_rank=2)
    watch = Watch(None, dist.get_rank(), 4)
    transport = Transport(
        dist.group.WORLD, torch.device("cpu"), torch.float32, torch.float32, 20.0, watch, Ledger(lambda pointer: False)
    )
    transport.meet(lower(schedule, SHAPE, Batch(1, (1,))).messages)
    transport.close()
    return transport.ledger.held.transit_bytes


def test_pairs_in_a_circle_meet(four_ranks: Ranks) -> None:
    assert four_ranks.run(met) == [0, 0, 0, 0]


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
    watch = Watch(None, 0, 1)
    transport = Transport(
        None, torch.device("cpu"), torch.float32, torch.float32, 20.0, watch, Ledger(lambda pointer: False)
    )
    tensor = TensorParallel.__new__(TensorParallel)
    for named in (transport._named(None, -1), tensor._named(), wire._named(None, "keys and values"), watch.together()):
        with pytest.raises(torch.OutOfMemoryError), named:
            raise torch.OutOfMemoryError("CUDA out of memory")
