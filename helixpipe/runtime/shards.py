"""Shards: each replica updates its own share of the parameters and keeps optimizer state for no others (ZeRO-1,
arXiv 1910.02054).

    gradients summed on all replicas ── each updates its share ── every share sent to all

Whole parameters that are trained are dealt out (`mesh.deal`). An update is the same whoever makes it, so
weights stay those of a run without shards, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helixpipe.errors import RankError
from helixpipe.mesh import buckets, deal
from helixpipe.runtime.mesh import Mesh
from helixpipe.runtime.reduction import nbytes
from helixpipe.runtime.watch import Watch
from helixpipe.sequence.wire import wire_of


class Shards:
    """Of the masters that this rank and its replicas (dp, cp) hold. Without replicas, all are its own."""

    def __init__(self, masters: Mapping[str, nn.Parameter], mesh: Mesh, watch: Watch) -> None:
        self._group, self._watch = mesh.replicas, watch
        replicas = dist.get_world_size(self._group) if self._group is not None else 1
        mine = dist.get_rank(self._group) if self._group is not None else 0
        dealt = deal({name: master.numel() for name, master in masters.items() if master.requires_grad}, replicas)
        self._shares = [{name: masters[name] for name in names} for names in dealt]
        self.mine = self._shares[mine]
        """Those to update here, by name."""

    @torch.no_grad()
    def share(self) -> None:
        """Every replica's updated parameters to all. Collective."""
        if self._group is None:
            return
        self._watch.doing = "the sharing of updates"
        for owner, share in enumerate(self._shares):
            for bucket in buckets((parameter.data for parameter in share.values()), nbytes):
                self._send(bucket, owner)

    def _send(self, tensors: list[Tensor], owner: int) -> None:
        assert self._group is not None
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        wire = flat.to(wire_of(self._group, flat.device))
        try:
            dist.broadcast(wire, dist.get_global_rank(self._group, owner), self._group)
        except RuntimeError as error:
            raise RankError(
                f"{self._watch.me}, at {self._watch.doing}, lost a rank that has the same parameters; {self._watch.others()}"
            ) from error
        for tensor, updated in zip(tensors, wire.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(updated.view_as(tensor))
