"""Times and bytes as a person reads them: four digits, and a unit that fits."""

from __future__ import annotations

from typing import NamedTuple

from helixpipe.view.svg import BYTES, SECONDS


class Scale(NamedTuple):
    """What to divide by, and the name of the result's unit."""

    size: float
    name: str

    def told(self, number: float) -> str:
        return f"{number / self.size:.4g} {self.name}"


def time_scale(longest: float, unit: str = "s") -> Scale:
    """Seconds at a scale that fits `longest`; any other unit as it is."""
    if unit != "s":
        return Scale(1.0, unit)
    return next((Scale(*scale) for scale in SECONDS if longest >= scale[0]), Scale(1.0, "s"))


def byte_scale(most: float) -> Scale:
    """Bytes at a scale that fits `most`."""
    return next((Scale(*scale) for scale in BYTES if most >= scale[0]), Scale(1.0, "B"))


def count(number: int, thing: str) -> str:
    """`1 rank`, `2 ranks`, `2 micro-batches`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('h') else 's'}"
