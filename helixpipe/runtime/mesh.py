"""Mesh: the ranks of a run as one of them sees them, from a torch DeviceMesh with the field's names.

    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "cp"))
    Pipeline(model, schedule, mesh)

              dp 0        dp 1
           cp 0  cp 1  cp 0  cp 1      A pipeline is a column: messages travel in it. Ranks that differ in dp or
    pp 0     0 --- 1     2 --- 3       cp hold the same parameters, whose gradients are summed. A cp line (---)
             |     |     |     |       shares sequences; a tp line, where there is one, shares matrices.
    pp 1     4 --- 5     6 --- 7

Directions that the mesh does not name have one rank; a mesh without names is all pp.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store, _set_pg_timeout

from helixpipe.errors import ConfigError
from helixpipe.mesh import AXES, MeshShape
from helixpipe.runtime.watch import Watch, starting
from helixpipe.sequence.wire import wire_of

Group = dist.ProcessGroup | None
"""None is this process alone."""
T = TypeVar("T")
CPU = torch.device("cpu")


class Place(NamedTuple):
    """Where a rank stands."""

    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp: int = 0


class Mesh:
    """Sizes, places and process groups. Every rank makes it at the same time: it may make groups."""

    def __init__(self, mesh: DeviceMesh | None, timeout_s: float, device: torch.device = CPU) -> None:
        """None is all ranks of the default group, or this process alone. Raises ConfigError for an unknown name.

        Collectives in all groups but those of a plain pipeline end after `timeout_s`; messages between cp ranks,
        after the time that their group was made with. `device`: where ranks compute.
        """
        self.device_mesh = mesh
        self._names = _names(mesh)
        self._lines: dict[str, DeviceMesh] = {}
        if mesh is None:
            self.everyone: Group = dist.group.WORLD if dist.is_initialized() else None
            count = dist.get_world_size(self.everyone) if self.everyone is not None else 1
            sizes = {"pp": count}
            places = {rank: Place(rank) for rank in range(count)}
        else:
            sizes = dict(zip(self._names, mesh.mesh.shape, strict=True))
            self.everyone = self._joined(self._names)
            places = {
                int(rank): Place(**dict(zip(self._names, at.tolist(), strict=True)))
                for rank, at in zip(mesh.mesh.flatten(), (mesh.mesh >= 0).nonzero(), strict=True)
            }
        self.shape = Place(*(int(sizes.get(name, 1)) for name in AXES))
        mine = dist.get_rank() if dist.is_initialized() else 0
        self._members = members = dist.get_process_group_ranks(self.everyone) if self.everyone is not None else [mine]
        self.places = [places.get(rank, Place()) for rank in members]
        """Of all ranks, as `gathered` has them."""
        self.rank = members.index(mine)
        self.here = self.places[self.rank]
        self.replicas, self.copies = self._joined(("dp", "cp")), self._joined(("dp", "cp", "tp"))
        """Ranks with the same parameters; and those with the same ones of all that tp does not divide."""
        if self._names != ("pp",):
            for group in {self.everyone, self.replicas, self.copies, *map(self.group, AXES)} - {None}:
                _set_pg_timeout(timedelta(seconds=timeout_s), group)
        self._hosts = self._between_hosts(device, timedelta(seconds=timeout_s))
        self._wire = wire_of(self._hosts, device)
        for axis, at in self.here._asdict().items():
            group = self.group(axis)
            if group is not None and dist.get_rank(group) != at:
                raise ConfigError(f"mesh: ranks fall along {axis}; let their numbers rise along every dimension")

    def group(self, axis: str) -> Group:
        """The ranks that differ from this one in one direction only; None when it is alone in it."""
        if self.device_mesh is None:
            return self.everyone if axis == "pp" else None
        return self._joined((axis,))

    def name(self, rank: int) -> str:
        """`rank 3`, and where that is when there are several directions."""
        place = self.places[rank]
        where = ", ".join(f"{name} {at}" for name, at, size in zip(AXES, place, self.shape, strict=True) if size > 1)
        return f"rank {rank} ({where})" if sum(size > 1 for size in self.shape) > 1 else f"rank {rank}"

    @property
    def lines(self) -> list[list[int]]:
        """The ranks of every pipeline as the run numbers them; none where other ranks of the run are not in this mesh."""
        if self.everyone is None or len(self._members) < dist.get_world_size():
            return []
        found: dict[Place, list[int]] = {}
        for rank, place in sorted(zip(self._members, self.places, strict=True), key=lambda each: each[1].pp):
            found.setdefault(place._replace(pp=0), []).append(rank)
        return list(found.values())

    def watch(self, store: Store | None) -> Watch:
        """A watch over all ranks, whose line is this rank's pipeline."""
        ranks = range(len(self.places))
        line = [self.places.index(self.here._replace(pp=pp)) for pp in range(self.shape.pp)]
        return Watch(store, self.rank, len(ranks), [self.name(rank) for rank in ranks], line)

    def line(self, axis: str) -> DeviceMesh:
        """The one-dimensional mesh of `group(axis)`."""
        assert self.device_mesh is not None
        if self.device_mesh.ndim == 1:
            return self.device_mesh
        if axis not in self._lines:  # every tensor of a checkpoint asks
            self._lines[axis] = self.device_mesh[axis]
        return self._lines[axis]

    def gathered(self, mine: Sequence[float], watch: Watch) -> list[list[float]]:
        """Every rank's numbers, in the order of `places`. Collective."""
        if self._hosts is None:
            return [list(mine)]
        row = torch.tensor(mine, dtype=torch.float64, device=self._wire)
        rows = [torch.empty_like(row) for _ in self.places]
        with watch.together():
            dist.all_gather(rows, row, self._hosts)
        return [r.tolist() for r in rows]

    def told(self, mine: T) -> list[T]:
        """Every rank's object, in the order of `places`. Collective, before there is a watch."""
        if self._hosts is None:
            return [mine]
        found = [mine] * len(self.places)
        with starting(self.rank):
            dist.all_gather_object(found, mine, self._hosts)
        return found

    def _between_hosts(self, device: torch.device, timeout: timedelta) -> Group:
        """For numbers of all ranks, from CPU to CPU: a group of their own where the ranks' own moves device memory.

        All ranks of the run have to make a group. Where some are not in this mesh, numbers take the way of tensors.
        """
        if wire_of(self.everyone, device).type == "cpu" or not self.lines:
            return self.everyone
        with starting(self.rank):
            group: Group = dist.new_group(self._members, timeout, "gloo")
        return group

    def _joined(self, axes: tuple[str, ...]) -> Group:
        """The ranks that differ from this one in these directions only."""
        if self.device_mesh is None:
            return None
        names = tuple(
            name for name, size in zip(self._names, self.device_mesh.mesh.shape, strict=True)
            if name in axes and size > 1
        )  # fmt: skip
        if not names:
            return None
        if self.device_mesh.ndim == 1:
            return self.device_mesh.get_group()
        mesh = self.device_mesh[names]
        if len(names) > 1:
            with starting(dist.get_rank()):
                mesh = mesh._flatten()
        return mesh.get_group()


def make_device_mesh(shape: MeshShape, device: torch.device | str, timeout_s: float) -> DeviceMesh | None:
    """The DeviceMesh of a shape over all ranks, tp innermost; None for a plain pipeline. Collective.

    Unlike those of `init_device_mesh`, its groups wait `timeout_s`, also for messages between two ranks.
    """
    names = tuple(name for name in AXES if name == "pp" or getattr(shape, name) > 1)
    if len(names) == 1:
        return None
    grid = torch.arange(shape.size).view([getattr(shape, name) for name in names])
    groups = []
    for dim in range(len(names)):
        lines = grid.movedim(dim, -1).flatten(0, -2).tolist()
        with starting(dist.get_rank()):
            group, _ = dist.new_subgroups_by_enumeration(lines, timeout=timedelta(seconds=timeout_s))
        groups.append(group)
    return DeviceMesh.from_group(groups, torch.device(device).type, mesh=grid, mesh_dim_names=names)


def _names(mesh: DeviceMesh | None) -> tuple[str, ...]:
    if mesh is None or (mesh.ndim == 1 and not mesh.mesh_dim_names):
        return ("pp",)
    names = mesh.mesh_dim_names or ()
    unknown = [name for name in names if name not in AXES]
    if unknown or not names:
        what = f"dimension '{unknown[0]}' is not known" if unknown else f"{mesh.ndim} dimensions without names"
        raise ConfigError(f"mesh: {what}; name them {', '.join(AXES)}, as few as you need (mesh_dim_names)")
    return names
