"""Layouts: the ways to lay pp x dp x cp x tp over so many accelerators, each with what it needs to be priced.

    accelerators = pp * dp * cp * tp        sequences of a step = micro-batches * microbatch_size * dp

Directions that are given stay. What does not divide the model, the sequence or the batch is no layout, and why not is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from helixpipe.errors import ConfigError
from helixpipe.mesh import METHODS, MeshShape
from helixpipe.predict.estimate import Setting
from helixpipe.predict.nodes import Nodes

LONGEST_JOINED = 32768
"""Tokens: micro-batches of several sequences are tried up to so many, where their number is not given."""
OPTIMIZERS = ("replicated", "sharded")


@dataclass(frozen=True)
class Asked:
    """What a plan is for. Directions that are None are searched."""

    setting: Setting
    """The model, the sequence, the accelerator and what is kept; its directions are not read."""
    accelerators: int
    sequences: int
    """Of a step, on all replicas."""
    memory_bytes: float
    """Of each accelerator."""
    nodes: Nodes
    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    tp: int | None = None
    context_method: str | None = None
    optimizer: str | None = None
    microbatch_size: int | None = None
    vocabulary: str | None = None
    """last or spread."""
    families: tuple[str, ...] = ()
    """Those to consider; () is all."""

    def __post_init__(self) -> None:
        for name in ("accelerators", "sequences", "pp", "dp", "cp", "tp", "microbatch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value}; give at least 1")

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.setting.sequence_length


@dataclass(frozen=True)
class Layout:
    """One mesh, the micro-batches that each of its replicas has, and the optimizer's state."""

    mesh: MeshShape
    optimizer: str
    microbatches: int
    microbatch_size: int

    def __str__(self) -> str:
        """`pp 2 x dp 4 x tp 8`; of a mesh without a pipeline `dp 8 x tp 8`."""
        sizes = [(name, getattr(self.mesh, name)) for name in ("pp", "dp", "cp", "tp")]
        told = [f"{name} {size}" for name, size in sizes if size > 1] or ["one accelerator"]
        return " x ".join(told)

    @property
    def told(self) -> list[str]:
        """What else there is to say of it."""
        found = [self.mesh.context_method] if self.mesh.cp > 1 else []
        found += ["optimizer sharded"] if self.optimizer == "sharded" else []
        return found + ([f"micro-batches of {self.microbatch_size}"] if self.microbatch_size > 1 else [])

    @property
    def key(self) -> tuple[int, ...]:
        """The mesh alone: layouts of one mesh are one row of an answer."""
        return self.mesh.pp, self.mesh.dp, self.mesh.cp, self.mesh.tp

    def setting(self, asked: Asked) -> Setting:
        """What its schedules are priced for. Raises ConfigError where it divides something that it may not."""
        mesh, base = self.mesh, asked.setting
        multiple = math.lcm(base.segment_multiple, mesh.unit)
        bare = replace(
            base, tensor_parallel=mesh.tp, context_parallel=mesh.cp, data_parallel=mesh.dp,
            context_method=mesh.context_method, optimizer=self.optimizer, microbatch_size=self.microbatch_size,
            segment_multiple=multiple if mesh.unit > 1 else base.segment_multiple,
        )  # fmt: skip
        return bare.on_nodes(asked.nodes, mesh.pp)


@dataclass(frozen=True)
class Found:
    """All layouts, and what was refused."""

    layouts: tuple[Layout, ...]
    refused: tuple[str, ...]

    @cached_property
    def why(self) -> str:
        """The reason for the most of what was refused."""
        return max(self.refused, key=self.refused.count, default="")


def layouts(asked: Asked) -> Found:
    """Every layout that divides model, sequence and batch; in a fixed order."""
    found: list[Layout] = []
    refused: list[str] = []
    given = {name: getattr(asked, name) for name in ("pp", "dp", "cp", "tp")}
    meshes = list(_factors(asked.accelerators, tuple(given.values())))
    if not meshes:
        named = {name: size for name, size in given.items() if size is not None}
        product, told = math.prod(named.values()), " x ".join(f"{name} {size}" for name, size in named.items())
        refused.append(f"{told} are {product}" if asked.accelerators % product == 0 else f"{told} does not divide them")
    for pp, dp, cp, tp in meshes:
        if pp > asked.setting.shape.layers:
            refused.append(f"pp {pp}: the model has {asked.setting.shape.layers} layers")
            continue
        for method in _methods(asked, cp):
            mesh = MeshShape(pp, dp, cp, tp, method, asked.setting.layout)
            try:
                mesh.check(asked.setting.shape, (asked.setting.sequence_length,))
                _check_heads(asked, mesh)
            except ConfigError as error:
                refused.append(str(error))
                continue
            sizes = [size for size in _sizes(asked) if asked.sequences % (dp * size) == 0]
            if not sizes:
                refused.append(f"batch: {asked.sequences} sequences do not divide over dp {dp}")
            for size in sizes:
                of_mesh = [
                    Layout(mesh, kind, asked.sequences // (dp * size), size) for kind in _optimizers(asked, mesh)
                ]
                found += of_mesh
    return Found(tuple(found), tuple(refused))


def _factors(number: int, given: Sequence[int | None]) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of as many, some of which are given."""
    if not given:
        if number == 1:
            yield ()
        return
    first, *rest = given
    for size in [first] if first is not None else [n for n in range(1, number + 1) if number % n == 0]:
        if number % size == 0:
            for others in _factors(number // size, rest):
                yield size, *others


def _methods(asked: Asked, cp: int) -> tuple[str, ...]:
    if asked.context_method is not None:
        return (asked.context_method,)
    return METHODS if cp > 1 else METHODS[:1]


def _check_heads(asked: Asked, mesh: MeshShape) -> None:
    """Of key heads that Ulysses repeats, bytes are not predicted."""
    kv_heads = asked.setting.shape.kv_heads // mesh.tp
    if mesh.cp > 1 and mesh.context_method == "ulysses" and kv_heads % mesh.cp:
        raise ConfigError(
            f"mesh.context_method: ulysses repeats the {kv_heads} key heads of a rank over cp {mesh.cp}, which is not predicted"
        )


def _sizes(asked: Asked) -> list[int]:
    if asked.microbatch_size is not None:
        return [asked.microbatch_size]
    length = asked.setting.sequence_length
    return [size for size in (1, 2, 4) if size == 1 or size * length <= LONGEST_JOINED]


def _optimizers(asked: Asked, mesh: MeshShape) -> tuple[str, ...]:
    if asked.optimizer is not None:
        return (asked.optimizer,)
    return OPTIMIZERS if mesh.dp * mesh.cp > 1 else OPTIMIZERS[:1]
