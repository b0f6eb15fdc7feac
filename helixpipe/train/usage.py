"""Usage: what a run has read, and what padding and imbalance cost it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Epochs = tuple[tuple[str, float], ...]
"""Each source and how often it was read."""


@dataclass(frozen=True)
class Usage:
    """Of some steps. They add up."""

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    """Without padding."""
    padding: int = 0
    """Tokens that fill sequences up and count nothing."""
    imbalance_sum: float = 0.0
    """Of each step, the dearest micro-batch's work over the mean one's; all of them added."""
    imbalance_most: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.steps + other.steps,
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.padding + other.padding,
            self.imbalance_sum + other.imbalance_sum,
            max(self.imbalance_most, other.imbalance_most),
        )

    @property
    def padding_share(self) -> float:
        return self.padding / max(self.tokens + self.padding, 1)

    @property
    def imbalance(self) -> float:
        """The mean over the steps."""
        return self.imbalance_sum / max(self.steps, 1)

    def table(self, epochs: Epochs) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        told = [{"source": name, "epochs": count} for name, count in epochs]
        return dataclasses.asdict(self) | {
            "padding_share": self.padding_share, "imbalance": self.imbalance, "epochs": told,
        }  # fmt: skip

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Usage:
        """What `table` wrote; nothing of an earlier version's."""
        return Usage(**{field.name: table[field.name] for field in dataclasses.fields(Usage) if field.name in table})

    def told(self, epochs: Epochs) -> str:
        """In one line."""
        imbalance = f"dearest micro-batch {self.imbalance:.3f} of the mean, {self.imbalance_most:.3f} at most"
        sources = ", ".join(f"{count:.3g} epochs of {name}" for name, count in epochs)
        return f"read {self.sequences:,} sequences, {self.tokens:,} tokens, padding {self.padding_share:.2%}, {imbalance}: {sources}"
