"""MeshShape: how many ranks there are in each direction, and what they can share. Without torch.

    pp  parts of the model       schedule.ranks; messages between stages
    dp  sequences of a batch     gradients summed once a step
    cp  tokens of a sequence     keys and values travel in attention; gradients summed once a step
    tp  heads and MLP columns    activations gathered and summed in every layer, norms on shards of the sequence

What does not divide is refused here, before any rank is started, with what would work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from helixpipe.errors import ConfigError
from helixpipe.parts.shape import TENSOR_DIVIDED, ModelShape

AXES = ("pp", "dp", "cp", "tp")
METHODS = ("ring", "ulysses")
LAYOUTS = ("zigzag", "striped", "plain")
BUCKET_BYTES = 2**25
T = TypeVar("T")


@dataclass(frozen=True)
class MeshShape:
    """`context_method` and `layout` say how cp ranks share a sequence; Ulysses has contiguous shards always."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    context_method: str = "ring"
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1:
                raise ConfigError(f"mesh.{name}: {getattr(self, name)}; give at least 1")
        for name, known in (("context_method", METHODS), ("layout", LAYOUTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"mesh.{name}: '{getattr(self, name)}' is not known; known: {', '.join(known)}")

    def __str__(self) -> str:
        """`pp 2 x cp 2`: the directions that have more than one rank, and always pp."""
        return " x ".join(f"{name} {getattr(self, name)}" for name in AXES if name == "pp" or getattr(self, name) > 1)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def unit(self) -> int:
        """Tokens of a whole sequence, and of each of its segments, must be a multiple of it."""
        zigzag = self.context_method == "ring" and self.layout == "zigzag" and self.cp > 1
        return math.lcm(2 * self.cp if zigzag else 1, self.cp * self.tp)

    def check(self, shape: ModelShape, lengths: Sequence[int]) -> None:
        """Raise ConfigError when this model, or sequences of segments of `lengths` tokens, cannot be divided so."""
        shape.check_sharing(self.cp, self.tp)
        self._check_heads(shape)
        self._check_lengths(lengths)

    def check_ranks(self, running: int) -> None:
        """Raise ConfigError when not as many ranks are running as this mesh has."""
        if running == self.size:
            return
        if self.size == self.pp:
            raise ConfigError(
                f"schedule.ranks: {self.pp}, and torchrun started {running} processes; make them the same"
            )
        raise ConfigError(
            f"mesh: {self} are {self.size} ranks, and torchrun started {running} processes; start {self.size}, "
            f"or choose schedule.ranks, mesh.dp, mesh.cp and mesh.tp that multiply to {running}"
        )

    def _check_heads(self, shape: ModelShape) -> None:
        if self.tp > 1 and shape.qk_norm and shape.qk_norm_over == "width":
            raise ConfigError(
                f"mesh.tp: {self.tp} ranks divide the heads, and model.qk_norm_over 'width' needs all of them together; use tp 1"
            )
        divided = {name: getattr(shape, name) for name in TENSOR_DIVIDED}
        for name, count in divided.items():
            if count % self.tp:
                raise ConfigError(
                    f"mesh.tp: {self.tp} ranks do not divide model.{name} {count}; "
                    f"tp may be {_or(_divisors(math.gcd(*divided.values())))}"
                )
        heads = shape.heads // self.tp
        if self.cp > 1 and self.context_method == "ulysses" and heads % self.cp:
            raise ConfigError(
                f"mesh.context_method: ulysses divides the heads of a rank, {heads}, over cp {self.cp}; "
                f"cp may be {_or(_divisors(heads))}, or use ring"
            )

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        unit, whole = self.unit, sum(lengths)
        if all(length % unit == 0 for length in lengths):
            return
        how = f"{self.layout} layout" if self.cp > 1 and self.context_method == "ring" else "mesh"
        over = f"{self.context_method} over cp {self.cp}, tp {self.tp}" if self.cp > 1 else f"tp {self.tp}"
        if whole % unit:
            down, up = whole // unit * unit, -(-whole // unit) * unit
            raise ConfigError(
                f"train.sequence_length: {whole} tokens do not divide for {over}, whose {how} needs a multiple of {unit}; "
                f"use {_or([n for n in (down, up) if n])}"
            )
        raise ConfigError(
            f"schedule.segment_multiple: segments of {', '.join(map(str, lengths))} tokens do not divide for {over}, "
            f"whose {how} needs multiples of {unit}; set it to {unit} or a multiple of that"
        )


def deal(sizes: Mapping[str, int], replicas: int) -> list[list[str]]:
    """Names for each replica to update alone: whole parameters, the largest first, to whoever has least."""
    shares: list[list[str]] = [[] for _ in range(replicas)]
    held = [0] * replicas
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = held.index(min(held))
        shares[least].append(name)
        held[least] += sizes[name]
    return shares


def buckets(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of about BUCKET_BYTES, which are sent as one tensor."""
    bucket: list[T] = []
    held = 0
    for item in items:
        bucket.append(item)
        held += nbytes(item)
        if held >= BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _or(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
