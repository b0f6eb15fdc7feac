"""Non-finite: which part made the first value of a step that is no finite number.

The step runs once more with checks, on the same tokens, weights and random numbers:

    weights    embed ──► norm.0 ──► qkv.0 ──► ... ──► head        what each part makes
               embed ◄── norm.0 ◄── qkv.0 ◄── ... ◄── head        what each part's backward gives to what it read
    gradients of weights

Each rank keeps the first that it meets in this order, by micro-batch and segment within each line, and the first of all ranks is
the cause: what comes later in the flow of data may be its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from helixpipe.parts.part import FIRST, FIRST_SHARDS, LAST, LAST_SHARDS, Part

if TYPE_CHECKING:
    from helixpipe.runtime.mesh import Mesh
    from helixpipe.runtime.tape import Tape
    from helixpipe.runtime.weights import Weights

_WEIGHT, _FORWARD, _BACKWARD, _GRADIENT = range(4)
Edge = tuple[Node, int]


class Found(NamedTuple):
    """A value that is not finite. They sort as data flows."""

    phase: int
    microbatch: int
    segment: int
    """Counted down in a backward, which runs them in this order."""
    place: int
    """In the chain of parts; counted down in a backward."""
    made_here: bool
    """Of a backward: by the part, and not in the sum that reaches it, which comes before."""
    name: str
    """Of a part, or of a parameter."""


class Probe:
    """The checks of one rank. `order`: the place of each part in the chain."""

    def __init__(self, order: Mapping[Part, int]) -> None:
        self._order = order
        self.first: Found | None = None

    def weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Weights before the step."""
        self._named(_WEIGHT, ((name, parameter.detach()) for name, parameter in parameters.items()))

    def gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Gradients of weights after it."""
        self._named(_GRADIENT, ((name, p.grad) for name, p in parameters.items() if p.grad is not None))

    def made(self, part: Part, microbatch: int, segment: int, values: Sequence[Tensor]) -> None:
        """What a part's forward made."""
        if not all(map(is_finite, values)):
            self._keep(Found(_FORWARD, microbatch, segment, self._order[part], True, str(part)))

    def follow(self, part: Part, microbatch: int, segment: int, read: Sequence[Edge], values: Sequence[Tensor]) -> None:
        """Look at what reaches a part in the backward that comes, and at what it gives to `read`: see `edges`."""
        place = -self._order[part]
        reaches = Found(_BACKWARD, microbatch, -segment, place, False, str(part))
        for value in values:
            if value.requires_grad:
                value.register_hook(partial(self._look, reaches))
        into, ends = set(read), {node for node, _ in read}
        waiting, seen = [value.grad_fn for value in values if value.grad_fn is not None], set[Node]()
        while waiting:
            node = waiting.pop()
            if node in seen or node in ends:
                continue
            seen.add(node)
            at = [i for i, edge in enumerate(node.next_functions) if edge in into]
            if at:
                node.register_hook(partial(self._given, reaches._replace(made_here=True), at))
            waiting += [each for each, _ in node.next_functions if each is not None]

    def _given(self, found: Found, at: list[int], to_read: Sequence[Tensor | None], _: object) -> None:
        """A node of a part's backward ran; those of its results go to what the part read."""
        for i in at:
            self._look(found, to_read[i])

    def _look(self, found: Found, gradient: Tensor | None) -> None:
        if gradient is not None and not is_finite(gradient):
            self._keep(found)

    def _named(self, phase: int, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            if not is_finite(tensor):
                self._keep(Found(phase, 0, 0, 0, True, name))

    def _keep(self, found: Found) -> None:
        self.first = found if self.first is None else min(self.first, found)


def edges(values: Iterable[Tensor]) -> list[Edge]:
    """Where the gradients of what a part reads will go, asked before it runs. The nodes live as long as this does."""
    found = (get_gradient_edge(value) for value in values if value.requires_grad)
    return [(edge.node, edge.output_nr) for edge in found]


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a finite number."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))  # without a tensor of its size


def search(
    run: Callable[[], object], tapes: Iterable[Tape], weights: Weights, chain: Sequence[Part], mesh: Mesh, segments: int
) -> str:
    """What made the first value that is not finite, in words; "" where it does not come again. Collective.

    `run` takes the step. No gradients are left, and buffers are as they were.
    """
    probe, parameters = Probe({part: place for place, part in enumerate(chain)}), weights.masters
    buffers = [(buffer, buffer.clone()) for module in weights.modules.values() for buffer in module.buffers()]
    tapes = list(tapes)
    _let_go(parameters)
    probe.weights(parameters)
    try:
        for tape in tapes:
            tape.probe = probe
        run()
    finally:
        for tape in tapes:
            tape.probe = None
        for buffer, before in buffers:
            buffer.data.copy_(before)
    probe.gradients(parameters)
    _let_go(parameters)
    everyone = [probe.first]
    if mesh.everyone is not None:
        everyone = [None] * len(mesh.places)
        dist.all_gather_object(everyone, probe.first, mesh.everyone)
    found = [(first, rank) for rank, first in enumerate(everyone) if first is not None]
    return in_words(*min(found), mesh.name, segments) if found else ""


def _let_go(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def in_words(found: Found, rank: int, rank_name: Callable[[int], str], segments: int) -> str:
    """`layer 3's mlp, on rank 1, micro-batch 2, forward`."""
    where = f"on {rank_name(rank)}"
    if found.phase == _WEIGHT:
        return f"{found.name}, {where}, which was not finite before the step"
    if found.phase == _GRADIENT:
        return f"the gradient of {found.name}, {where}"
    piece = f", segment {abs(found.segment)}" if segments > 1 else ""
    way = "forward" if found.phase == _FORWARD else "backward"
    told = f"{_called(Part.parse(found.name))}, {where}, micro-batch {found.microbatch}{piece}, {way}"
    return told if found.made_here else f"the sum of the gradients that reach {told}"


def _called(part: Part) -> str:
    if part.about.sharded:
        return f"shard {part.shard} of the {part.shards} of {part.kind}"
    if part.kind in (FIRST, LAST):
        return f"the {part.kind}"
    return (
        f"the part {part.kind}" if part.kind in (*FIRST_SHARDS, *LAST_SHARDS) else f"layer {part.layer}'s {part.kind}"
    )
