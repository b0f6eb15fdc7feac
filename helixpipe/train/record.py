"""Record: what one training step gave and cost, as numbers to compute with and as fields of a line to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from helixpipe.config import Config
from helixpipe.predict.timeline import Totals


class Beside(NamedTuple):
    """Seconds of rank 0 since the last line in what is no forward, backward or update."""

    data_s: float = 0.0
    """Waiting for the batch, which is read ahead."""
    checkpoint_s: float = 0.0
    evaluation_s: float = 0.0


class Ranks(NamedTuple):
    """What stands out among all ranks."""

    slowest: int = 0
    """The rank whose actions took longest beside their own median (see `straggler`)."""
    slowest_ratio: float = 1.0
    """How many times that median."""
    slowest_name: str = "rank 0"
    """How that rank is called."""
    allocated_bytes: float = 0.0
    """The most that tensors had at one time since the last line on any rank's device; 0 where no allocator counts."""
    reserved_bytes: float = 0.0
    """The same of what the allocator had from the device."""

    @staticmethod
    def of(numbers: Sequence[Sequence[float]], name: Callable[[int], str]) -> Ranks:
        """`numbers`: of every rank the ratio and its two peaks of memory."""
        ratios, allocated, reserved = zip(*numbers, strict=True)
        slowest = ratios.index(max(ratios))
        return Ranks(slowest, ratios[slowest], name(slowest), max(allocated), max(reserved))


class StepRecord(NamedTuple):
    """What one step gave and cost."""

    step: int
    loss: float
    """Mean nats per target token."""
    gradient_norm: float
    """Over all ranks, before clipping."""
    learning_rate: float
    seconds: float
    totals: Totals
    flops: float = 0.0
    """The model's own: see `model_flops`."""
    beside: Beside = Beside()
    ranks: Ranks = Ranks()


class Stopwatch:
    """What is beside the steps, by the clock."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(Beside._fields, 0.0)

    @contextmanager
    def on(self, field: str) -> Iterator[None]:
        """Around what counts as `field` of `Beside`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[field] += time.perf_counter() - begun

    def taken(self) -> Beside:
        """What came together since the last time this was asked."""
        found = Beside(**self._seconds)
        self._seconds = dict.fromkeys(Beside._fields, 0.0)
        return found


class Metrics(NamedTuple):
    """A record beside the run that it is of."""

    record: StepRecord
    tokens_per_s: float
    tokens_per_s_per_accelerator: float
    mfu: float | None
    """Model FLOPs utilisation: the share of the accelerators' peak rate that the model's own FLOPs took; None where no peak is
    known."""

    @staticmethod
    def of(record: StepRecord, config: Config, peak_flops_per_s: float | None) -> Metrics:
        """`peak_flops_per_s`: of one accelerator, None where it is not known."""
        ranks = config.mesh_shape().size
        tokens_per_s = config.batch_size * config.train.sequence_length / record.seconds
        mfu = record.flops / (record.seconds * peak_flops_per_s * ranks) if peak_flops_per_s else None
        return Metrics(record, tokens_per_s, tokens_per_s / ranks, mfu)

    def numbers(self) -> dict[str, Any]:
        """A line of metrics.jsonl: the same keys for every step, None for what is not known here."""
        record, ranks = self.record, self.record.ranks
        return {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.gradient_norm,
            "learning_rate": record.learning_rate,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "tokens_per_s_per_accelerator": round(self.tokens_per_s_per_accelerator, 1),
            "model_flops_per_s": round(record.flops / record.seconds),
            "mfu": None if self.mfu is None else round(self.mfu, 6),
            "step_s": round(record.seconds, 6),
            **{name: round(seconds, 6) for name, seconds in record.beside._asdict().items()},
            "bubble_ratio": round(record.totals.bubble_ratio, 6),
            "peak_activation_bytes": list(record.totals.peak_activation_bytes),
            "peak_allocated_bytes": round(ranks.allocated_bytes) or None,
            "peak_reserved_bytes": round(ranks.reserved_bytes) or None,
            "slowest_rank": ranks.slowest,
            "slowest_rank_ratio": round(ranks.slowest_ratio, 3),
        }

    def fields(self) -> list[str]:
        """A line to read, in pieces: what matters most comes first, and what is not known or not worth a word is left out."""
        record, ranks, beside = self.record, self.record.ranks, self.record.beside
        more_than_one = self.tokens_per_s_per_accelerator < self.tokens_per_s
        found = [
            f"loss {record.loss:.4f}",
            f"grad norm {record.gradient_norm:.3f}",
            f"{self.tokens_per_s:,.0f} tokens/s",
        ]
        found += [f"MFU {self.mfu:.1%}"] if self.mfu is not None else []
        found.append(f"bubble {record.totals.bubble_ratio:.1%}")
        found += [f"data {beside.data_s:.2f} s"] if beside.data_s > record.seconds / 100 else []
        found.append(f"peak activations {shown_bytes(max(record.totals.peak_activation_bytes, default=0))}")
        if ranks.reserved_bytes:
            found.append(f"allocated {shown_bytes(ranks.allocated_bytes)} of {shown_bytes(ranks.reserved_bytes)}")
        found += [f"{self.tokens_per_s_per_accelerator:,.0f} tokens/s per accelerator"] if more_than_one else []
        found += [f"evaluation {beside.evaluation_s:.2f} s"] if beside.evaluation_s else []
        found += [f"checkpoint {beside.checkpoint_s:.2f} s"] if beside.checkpoint_s else []
        return found


def scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Of a line of metrics.jsonl what has a curve: its numbers but for the step, and of a list of bytes the most."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and name not in ("step", "slowest_rank"):
            found[name] = value
        elif isinstance(value, list) and name.endswith("_bytes") and value:
            found[name] = max(value)
    return found


def shown_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} GiB"
