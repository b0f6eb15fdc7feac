"""Simulated steps of real documents: each priced with its own batches, the mean and 95th percentile told, one of them drawn."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from helixpipe.commands.documents import ACROSS, Read, open_reading, packing_told
from helixpipe.commands.setting import as_flags, duration, gibibytes, schedule_from
from helixpipe.config_data import DataConfig
from helixpipe.flags import given_options
from helixpipe.parts.work import Lengths
from helixpipe.predict.estimate import Estimate, Setting
from helixpipe.predict.steps import Figures, figures, nearest_median, order_of_steps, percentile, price_step
from helixpipe.predict.steps import mean as mean_of

TAIL = 0.95


class Step(NamedTuple):
    """One step of a run: its number, what it takes, and what its rows are like."""

    number: int
    figures: Figures
    padding_share: float
    """Of all tokens."""
    imbalance: float
    """The dearest micro-batch over the mean one, by work."""


@dataclass(frozen=True)
class Steps:
    """The first steps of a run. `shown`: the estimate of the step nearest to the median, of its slowest replica."""

    setting: Setting
    data: DataConfig
    seed: int
    steps: tuple[Step, ...]
    shown: Estimate
    shown_step: int
    shown_replica: int

    @property
    def mean(self) -> Figures:
        return mean_of([step.figures for step in self.steps])

    def tail(self, name: str) -> float:
        """The 95th percentile of one of the figures."""
        return percentile([getattr(step.figures, name) for step in self.steps], TAIL)

    def tokens_per_s(self, step_s: float) -> float:
        """Of all replicas together, padding too."""
        setting = self.setting
        tokens = setting.sequence_length * setting.microbatch_size * self.shown.schedule.microbatches
        return setting.data_parallel * tokens / step_s

    @property
    def told(self) -> str:
        """Which step is drawn, in words."""
        replica = f", replica {self.shown_replica}, the slowest" if self.setting.data_parallel > 1 else ""
        return f"step {self.shown_step}, the nearest to the median{replica}"


def simulate_steps(args: argparse.Namespace, read: Read) -> Steps:
    """Price the first steps of a run over data. Raises ConfigError, DataError."""
    setting, schedule = schedule_from(args)
    order = order_of_steps(setting, schedule, args.family, given_options(args))
    data, seed, count = read
    reading = open_reading(data, setting, args.microbatches, seed)
    known: dict[Lengths, Figures] = {}  # windows of text are all alike
    steps = []
    for number in range(1, count + 1):
        rows, documents = reading.step(number), reading.documents(number)
        if documents not in known:
            with as_flags():
                known[documents] = figures(price_step(schedule, setting, documents, order=order))
        filled = sum(int(row.counts.sum()) for row in rows)
        padding = 1 - filled / (len(rows) * setting.sequence_length)
        steps.append(Step(number, known[documents], padding, reading.imbalance(rows)))
        if sys.stderr.isatty():
            print(f"\r{number} of {count} steps priced", end="\n" * (number == count), file=sys.stderr, flush=True)
    number = steps[nearest_median([step.figures.step_s for step in steps])].number
    replicas = price_step(schedule, setting, reading.documents(number), order=order)
    slowest = max(range(len(replicas)), key=lambda at: replicas[at].step_s)
    return Steps(setting, data, seed, tuple(steps), replicas[slowest], number, slowest)


def steps_as_json(found: Steps) -> dict[str, Any]:
    """Of all steps, as plain data."""
    mean, tail_s = found.mean, found.tail("step_s")
    imbalances = [step.imbalance for step in found.steps]
    each = [
        {
            "step": step.number,
            "step_s": step.figures.step_s,
            "ideal_s": step.figures.ideal_s,
            "bubble_ratio": step.figures.bubble_ratio,
            "peak_bytes": step.figures.peak_bytes,
            "padding_share": step.padding_share,
            "imbalance": step.imbalance,
        }
        for step in found.steps
    ]
    return {
        "path": str(found.data.path),
        "packing": found.data.packing,
        "longest": found.data.longest,
        "seed": found.seed,
        "shown_step": found.shown_step,
        "shown_replica": found.shown_replica,
        "step_s": {"mean": mean.step_s, "p95": tail_s},
        "ideal_s": {"mean": mean.ideal_s, "p95": found.tail("ideal_s")},
        "tokens_per_s": {"mean": found.tokens_per_s(mean.step_s), "p95": found.tokens_per_s(tail_s)},
        "bubble_ratio": {"mean": mean.bubble_ratio, "p95": found.tail("bubble_ratio")},
        "peak_bytes": mean.peak_bytes,
        "padding_share": _mean([step.padding_share for step in found.steps]),
        "imbalance": {"mean": _mean(imbalances), "p95": percentile(imbalances, TAIL)},
        "steps": each,
    }


def steps_table(found: Steps) -> list[str]:
    """What all steps together are like, above the one that is shown."""
    mean, tail_s, data = found.mean, found.tail("step_s"), found.data
    imbalances = [step.imbalance for step in found.steps]
    rows = [
        ("step", duration(mean.step_s), duration(tail_s)),
        ("tokens/s", f"{found.tokens_per_s(mean.step_s):,.0f}", f"{found.tokens_per_s(tail_s):,.0f}"),
        ("bubble", f"{mean.bubble_ratio:.1%}", f"{found.tail('bubble_ratio'):.1%}"),
        ("imbalance", f"{_mean(imbalances):.3f}", f"{percentile(imbalances, TAIL):.3f}"),
    ]
    note = [] if data.masks_documents else [ACROSS]
    return [
        f"steps 1 to {len(found.steps)} of {data.path}: {packing_told(data, found.seed)}",
        f"{'':<10} {'mean':>12} {'95th percentile':>16}",
        *(f"{name:<10} {one:>12} {other:>16}" for name, one, other in rows),
        f"fullest rank {gibibytes(mean.peak_bytes)} at most; padding {_mean([s.padding_share for s in found.steps]):.1%}; "
        "imbalance is the dearest micro-batch over the mean one",
        *note,
        "",
        f"{found.told}:",
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)
