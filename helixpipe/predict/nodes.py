"""Nodes: accelerators stand in nodes, and which links a group of ranks uses follows from how ranks are numbered.

    rank = ((pp * dp + dp') * cp + cp') * tp + tp'          tp innermost, as `runtime.mesh` numbers them and torchrun starts them

            node 0                node 1            a line of tp 2 is inside a node, and so is one of cp 2 here;
      tp 0-1   tp 0-1       tp 0-1   tp 0-1         the two pp ranks are in two nodes
      |-- cp 2 --|          |-- cp 2 --|
      pp 0                  pp 1

A group that leaves a node goes at the pace of the link between nodes. What goes around a ring of all its members, a sum or
a broadcast, has as many ways out of a node as the group has members there, each with an adapter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from helixpipe.errors import ConfigError
from helixpipe.mesh import MeshShape
from helixpipe.predict.hardware import Link


@dataclass(frozen=True)
class Nodes:
    """So many accelerators a node, and the links inside and across."""

    per_node: int
    inside: Link
    across: Link

    def __post_init__(self) -> None:
        if self.per_node < 1:
            raise ConfigError(f"per_node: {self.per_node}; give at least 1")

    def links(self, mesh: MeshShape) -> Links:
        """Those of a mesh whose first rank is the first of a node."""
        shares, replicas = mesh.cp * mesh.tp, mesh.dp * mesh.cp
        in_node = max(1, self.per_node // (replicas * mesh.tp))
        return Links(
            self._line(mesh.tp, 1),
            self._line(mesh.cp, mesh.tp),
            self._around(replicas, mesh.tp),
            self._around(replicas * mesh.tp, 1),
            self._line(mesh.pp, mesh.dp * shares) if mesh.pp > 1 else self.inside,
            in_node if self._fits(in_node * replicas * mesh.tp) else 1,
            self.inside,
        )

    def _fits(self, block: int) -> bool:
        """Whether every block of so many neighbours is inside a node."""
        return self.per_node % block == 0

    def _line(self, size: int, stride: int) -> Link:
        """Of messages between neighbours: the slowest one decides."""
        return self.inside if size == 1 or self._fits(size * stride) else self.across

    def _around(self, size: int, stride: int) -> Link:
        if size == 1 or self._fits(size * stride):
            return self.inside
        members = max(1, min(size, self.per_node // stride))
        bytes_per_s = min(self.inside.bytes_per_s, self.across.bytes_per_s * members)
        return replace(self.across, bytes_per_s=max(bytes_per_s, self.across.bytes_per_s))


@dataclass(frozen=True)
class Links:
    """What the groups of one mesh use."""

    tensor: Link
    context: Link
    replicas: Link
    """dp and cp together: sums of gradients of what tp divides, and updates of a sharded optimizer."""
    copies: Link
    """dp, cp and tp together: sums of gradients of the rest."""
    pipeline: Link
    """Between pipeline ranks, at worst."""
    neighbours: int
    """Pipeline ranks that stand in one node, one after another."""
    inside: Link
