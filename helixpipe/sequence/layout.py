"""Layout: which tokens of a sequence each rank holds. Pure arithmetic.

Four ranks in one ring; the digit is the rank that holds the token:

    plain     0000 1111 2222 3333     contiguous; with causal attention the last rank has most to do
    zigzag    00 11 22 33 33 22 11 00     chunks r and 2N-1-r: every rank the same work (L mod 2N = 0)
    striped   0123 0123 0123 0123     token i to rank i mod N: every rank the same work, but a token

Where ranks also divide the heads (Ulysses), the ranks of one ring place hold contiguous pieces of its tokens.
A rank's tokens rise, whatever the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helixpipe.errors import ConfigError, nearest
from helixpipe.model.tiles import Run

KINDS = ("plain", "zigzag", "striped")


@dataclass(frozen=True)
class Layout:
    """`ring` places around the rings times `heads` ranks at each. Rank r is at ring place r // heads.

    Raises ConfigError for an unknown kind and for a length that does not divide.
    """

    kind: str
    length: int
    """Tokens of the whole sequence."""
    ring: int
    heads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"sequence.layout: '{self.kind}' is not known{nearest(self.kind, KINDS)}")
        chunks = 2 * self.ring if self.kind == "zigzag" and self.ring > 1 else self.ring
        unit = math.lcm(chunks, self.ranks)
        if self.length < 1 or self.length % unit:
            down, up = self.length // unit * unit, -(-max(self.length, 1) // unit) * unit
            fits = f"{down} or {up}" if down else f"{up}"
            raise ConfigError(
                f"sequence.length: {self.length} tokens do not divide over {self.ranks} ranks in the {self.kind} layout, "
                f"which needs a multiple of {unit}; use {fits}"
            )

    @property
    def ranks(self) -> int:
        return self.ring * self.heads

    @property
    def local_length(self) -> int:
        """Tokens of one rank."""
        return self.length // self.ranks

    def runs(self, place: int) -> tuple[Run, ...]:
        """The tokens of one ring place, rising."""
        n, count = self.ring, self.length // self.ring
        if self.kind == "plain":
            return (Run(place * count, 1, count),)
        if self.kind == "striped":
            return (Run(place, n, count),)
        half = count // 2
        if place == n - 1:  # its chunks are neighbours
            return (Run(place * half, 1, count),)
        return Run(place * half, 1, half), Run((2 * n - 1 - place) * half, 1, half)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Where this rank's tokens are in the whole sequence: int64 [s_local], rising."""
        place, piece = divmod(rank, self.heads)
        of_place = [
            torch.arange(run.start, run.start + run.stride * run.count, run.stride, device=device)
            for run in self.runs(place)
        ]
        return torch.cat(of_place).chunk(self.heads)[piece]

    def shard(self, whole: Tensor, rank: int, dim: int = 1) -> Tensor:
        """One rank's tokens of a whole tensor. Its gradient is that rank's share: zero for all other tokens."""
        return whole.index_select(dim, self.positions(rank, whole.device))
