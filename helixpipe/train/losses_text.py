"""An evaluation as text: a table to read, or one JSON object."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from helixpipe.runtime.losses import Losses


class Evaluation(NamedTuple):
    """Held-out losses, and what they are of."""

    losses: Losses
    weights: str
    """Where they are from."""
    step: int
    """Training steps that they have seen."""
    sequences: int
    sequence_length: int

    @property
    def perplexity(self) -> float:
        """Infinite where it is beyond a float."""
        try:
            return math.exp(self.losses.mean)
        except OverflowError:
            return math.inf

    def table(self) -> str:
        """Lines of at most 80 columns but for what has a name of its own."""
        losses = self.losses
        lines = [
            f"held-out loss of {self.weights}",
            "",
            f"loss         {losses.mean:.4f} nats a token",
            f"perplexity   {self.perplexity:,.4g}" if self.perplexity < 1e6 else f"perplexity   {self.perplexity:.3e}",
            f"tokens       {losses.counted:,} counted, in {self.sequences:,} sequences of {self.sequence_length:,}",
            "",
        ]
        if losses.without:
            return "\n".join([*lines, f"by position  not known: {losses.without}"])
        rows = [("position", "loss", "tokens")]
        rows += [(_positions(b.first, b.stop), f"{b.mean:.4f}", f"{b.counted:,}") for b in losses.by_position]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            [*lines, *(f"{at:<{widths[0]}}  {loss:>{widths[1]}}  {tokens:>{widths[2]}}" for at, loss, tokens in rows)]
        )

    def to_json(self) -> str:
        """One line. What is no number is null."""
        losses = self.losses
        told: dict[str, Any] = {
            "weights": self.weights,
            "step": self.step,
            "loss": _number(losses.mean),
            "perplexity": _number(self.perplexity),
            "tokens": losses.counted,
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "by_position": [
                {"first": b.first, "last": b.stop - 1, "loss": _number(b.mean), "tokens": b.counted}
                for b in losses.by_position
            ],
        }
        if losses.without:
            told |= {"by_position": None, "by_position_not_known": losses.without}
        return json.dumps(told, allow_nan=False)


def _positions(first: int, stop: int) -> str:
    return f"{first:,}" if stop == first + 1 else f"{first:,} to {stop - 1:,}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
