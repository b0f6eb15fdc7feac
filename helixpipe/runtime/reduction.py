"""Reduction: gradients of parameters that several ranks hold, summed over them once a step.

Each rank has run its own sequences (dp), or its own tokens of them (cp, tp). Gradients go in buckets, in the
masters' precision, after the last action, and every rank gets the same sums bit by bit.

    bucket   [ gradient | gradient | zeros | used? used? used? ]     what this rank did not use, another may have
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helixpipe.errors import RankError
from helixpipe.mesh import buckets
from helixpipe.runtime.mesh import Group, Mesh
from helixpipe.runtime.watch import Watch
from helixpipe.sequence.wire import wire_of


class Reduction:
    """Of one rank's masters. `divided`: the names of those that tp divides, which its ranks do not share."""

    def __init__(self, masters: Mapping[str, nn.Parameter], divided: Collection[str], mesh: Mesh, watch: Watch) -> None:
        names = sorted(name for name, master in masters.items() if master.requires_grad)
        shares = [
            (mesh.replicas, [n for n in names if n in divided]),
            (mesh.copies, [n for n in names if n not in divided]),
        ]
        if mesh.replicas is mesh.copies:
            shares = [(mesh.copies, names)]
        self._shares = [
            (group, [masters[n] for n in chosen]) for group, chosen in shares if group is not None and chosen
        ]
        self._before: dict[nn.Parameter, Tensor] = {}
        self._watch = watch

    def begin(self) -> None:
        """Put aside what earlier steps gave: it is summed already."""
        for _, parameters in self._shares:
            for parameter in parameters:
                if parameter.grad is not None:
                    self._before[parameter], parameter.grad = parameter.grad, None

    @torch.no_grad()
    def finish(self) -> None:
        """Sum this step's gradients over the ranks, and add them to the earlier ones. Collective.

        A parameter that no rank used has none, as in plain autograd.
        """
        self._watch.doing = "the sum of gradients"
        for group, parameters in self._shares:
            for bucket in buckets(parameters, nbytes):
                self._sum(bucket, group)
        for parameter, before in self._before.items():
            parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        self._before.clear()

    def _sum(self, parameters: list[nn.Parameter], group: Group) -> None:
        used = [parameter.grad is not None for parameter in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor(used)])
        wire = flat.to(wire_of(group, flat.device))
        try:
            dist.all_reduce(wire, group=group)
        except RuntimeError as error:
            raise RankError(
                f"{self._watch.me}, at {self._watch.doing}, lost a rank that has the same parameters; {self._watch.others()}"
            ) from error
        *totals, counts = wire.split([*(g.numel() for g in gradients), len(used)])
        anywhere = used if all(used) else counts.tolist()
        for parameter, gradient, total, count in zip(parameters, gradients, totals, anywhere, strict=True):
            if count:
                parameter.grad = gradient.copy_(total.view_as(gradient))


def nbytes(tensor: Tensor) -> int:
    return tensor.nbytes
