"""What every kind of part says it exchanges inside a tensor-parallel group is what its module exchanges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_mesh import BASE, SHAPES, device_mesh, sized
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helixpipe.model.decoder import Decoder
from helixpipe.parts.kind import KINDS
from helixpipe.parts.part import LAST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.tape import Feed, run_part
from helixpipe.runtime.tensor import TensorParallel

BATCH, MESH = Batch(2, (24,)), sized(pp=2, tp=2)
Seen = list[tuple[str, int]]
"""Collectives in order: the call of torch's backend, the elements of the largest tensor that it was given."""


class Collectives(TorchDispatchMode):
    """Records every collective that is called within it, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append((func._opname, max(_elements(args))))
        return func(*args, **(kwargs or {}))


def _elements(given: Any) -> list[int]:
    """Of every tensor; a list of tensors counts together."""
    if isinstance(given, Tensor):
        return [given.numel()]
    if not isinstance(given, list | tuple):
        return [0]
    found = [n for each in given for n in _elements(each)]
    return [sum(found)] if given and all(isinstance(each, Tensor) for each in given) else [0, *found]


def counted(shape: ModelShape, mesh: tuple[tuple[str, int], ...]) -> dict[str, tuple[Seen, Seen]]:
    """On a rank: by kind, what a forward exchanges and what its backward does."""
    tensor = TensorParallel(device_mesh(mesh)["tp"].get_group(), shape)
    here = BATCH.sequence_length // tensor.ranks
    tokens = torch.zeros(BATCH.microbatch_size, here, dtype=torch.int64)
    feed = Feed(tokens, tokens, tensor.rank * here, gathered_start=0)
    found = {}
    for kind in KINDS:
        part = Part(kind, shape.layers if kind == LAST else 0)
        module = Decoder(shape).part(part)
        tensor.divide(part, module)
        inputs = [torch.randn(tensor.local.value_shape(value, BATCH, 0), requires_grad=True) for value in part.reads]
        with Collectives() as forward:
            outputs = run_part(part, module, inputs, feed, None)
        with Collectives() as backward:
            torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])
        found[kind] = forward.seen, backward.seen
    return found


@pytest.mark.parametrize("more", SHAPES, ids=str)
def test_every_kind_exchanges_what_it_says(four_ranks: Ranks, more: dict[str, Any]) -> None:
    shape = ModelShape(**(BASE | more))
    whole = BATCH.microbatch_size * BATCH.sequence_length * shape.hidden
    for found in four_ranks.run(counted, shape, MESH):
        assert found.keys() == KINDS.keys()
        for kind, each in found.items():
            for seen in each:
                assert len(seen) == KINDS[kind].exchanges, f"{kind}: {seen}"
                assert all(elements == whole for _, elements in seen), f"{kind}: {seen}"


def a_sum(mesh: tuple[tuple[str, int], ...]) -> Seen:
    """On a rank: a collective of none of ours."""
    with Collectives() as found:
        dist.all_reduce(torch.ones(7), group=device_mesh(mesh)["tp"].get_group())
    return found.seen


def test_no_collective_goes_unseen(four_ranks: Ranks) -> None:
    """The count above sees a sum that a part might do beside gathers and scatters."""
    assert four_ranks.run(a_sum, MESH) == [[("allreduce_", 7)]] * 4
