"""Layouts: the ways to lay pp x dp x cp x tp over so many accelerators, each with what it needs to be priced.

    accelerators = pp * dp * cp * tp        sequences of a step = micro-batches * microbatch_size * dp

Directions that are given stay. What does not divide the model, the sequence or the batch is no layout, and why not is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from helixpipe.errors import ConfigError
from helixpipe.mesh import AXES, METHODS, MeshShape
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
        sizes = [(name, getattr(self.mesh, name)) for name in AXES]
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
    refused: Counter[str]
    """Reasons, and how many each of them refused."""

    @property
    def why(self) -> str:
        return commonest(self.refused)


def commonest(reasons: Counter[str]) -> str:
    """The one that refused most, the first of several; nothing where there is none."""
    return reasons.most_common(1)[0][0] if reasons else ""


def layouts(asked: Asked) -> Found:
    """Every layout that divides model, sequence and batch; in a fixed order."""
    found: list[Layout] = []
    refused: Counter[str] = Counter()
    for pp, dp, cp, tp in _meshes(asked, refused):
        for method in _methods(asked, cp):
            mesh = MeshShape(pp, dp, cp, tp, method, asked.setting.layout)
            try:
                mesh.check(asked.setting.shape, (asked.setting.sequence_length,))
                _check_heads(asked, mesh)
            except ConfigError as error:
                refused[str(error)] += 1
                continue
            sizes = [size for size in _sizes(asked) if asked.sequences % (dp * size) == 0]
            if not sizes:
                refused[_undivided(asked, dp)] += 1
            for size in sizes:
                of_mesh = [
                    Layout(mesh, kind, asked.sequences // (dp * size), size) for kind in _optimizers(asked, mesh)
                ]
                found += of_mesh
    return Found(tuple(found), refused)


def _meshes(asked: Asked, refused: Counter[str]) -> Iterator[tuple[int, ...]]:
    """All ways to write the accelerators as pp x dp x cp x tp, but for sizes of one direction that no mesh can have."""
    given = {name: getattr(asked, name) for name in AXES}
    named = {name: size for name, size in given.items() if size is not None}
    product, whole = math.prod(named.values()), asked.accelerators
    if whole % product or (len(named) == len(given) and product < whole):
        told = " x ".join(f"{name} {size}" for name, size in named.items())
        refused[f"{told} does not divide them" if whole % product else f"{told} are {product}"] += 1
        return
    divisors = _divisors(whole)
    known: dict[tuple[str, int], str] = {}

    def can(name: str, size: int) -> bool:
        if (name, size) not in known:
            known[name, size] = _why_not(asked, name, size)
            refused.update([known[name, size]] if known[name, size] else [])
        return not known[name, size]

    def ways(names: Sequence[str], left: int) -> Iterator[tuple[int, ...]]:
        name, *others = names
        sizes = divisors if others else [left]
        for size in sizes if given[name] is None else [given[name]]:
            if left % size == 0 and (others or size == left) and can(name, size):
                for behind in ways(others, left // size) if others else [()]:
                    yield size, *behind

    yield from ways(AXES, whole)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _why_not(asked: Asked, name: str, size: int) -> str:
    """Why no mesh has so many ranks in a direction, whatever the others are; nothing where one may."""
    shape, length = asked.setting.shape, asked.setting.sequence_length
    if name == "pp":
        return f"pp {size}: the model has {shape.layers} layers" if size > shape.layers else ""
    if name == "dp":
        return _undivided(asked, size) if asked.sequences % size else ""
    why = ""
    for method in _methods(asked, size) if name == "cp" else METHODS[:1]:
        try:
            MeshShape(**{name: size}, context_method=method, layout=asked.setting.layout).check(shape, (length,))
            return ""
        except ConfigError as error:
            why = why or str(error)
    return why


def _undivided(asked: Asked, dp: int) -> str:
    return f"batch: {asked.sequences} sequences do not divide over dp {dp}"


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
