"""Reading: which rows a step has, from lengths and a seed alone. No token is read, and nothing is remembered.

    sequence of the run ──mixture──► source, its so-manieth ──► epoch and place ──permutation──► row

So a batch is a function of the seed and the step, on any layout, and a resumed run needs no state of a loader.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from helixpipe.parts.work import Lengths
from helixpipe.train.balance import LengthWork, dealt
from helixpipe.train.mixture import Mixture
from helixpipe.train.order import Permutation, drawn
from helixpipe.train.rows import Layout, Row
from helixpipe.train.usage import Usage

Packing = Literal["windows", "documents", "balanced"]
# what a permutation or a draw is for: one seed serves them all
_EPOCH, _OFFSET, _STEPS = 1, 2, 3


@dataclass(frozen=True)
class Reading:
    """The rows of a run's steps. `layouts` and `weights`: of each source."""

    layouts: tuple[Layout, ...]
    weights: tuple[float, ...]
    sequence_length: int
    microbatches: int
    """Of each replica."""
    microbatch_size: int = 1
    replicas: int = 1
    seed: int = 0
    look_ahead: int = 0
    """Steps whose rows are dealt among them so that each costs as much as the others of its step; 0: rows stay where they are."""
    work: LengthWork | None = None
    """What documents cost; None where all rows cost the same."""

    @property
    def rows_a_step(self) -> int:
        return self.microbatches * self.microbatch_size * self.replicas

    def step(self, step: int) -> list[Row]:
        """The rows of a training step, from 1 on: the first replica's micro-batches, then the next one's."""
        if step < 1:
            raise ValueError(f"step {step}: training begins with step 1")
        size = self.rows_a_step
        if not self.look_ahead:
            return self._light_ends([self._row(sequence) for sequence in range((step - 1) * size, step * size)])
        window, place = divmod(step - 1, self.look_ahead)
        return self._light_ends([self._row(sequence) for sequence in self._dealt(window)[place]])

    def documents(self, step: int) -> Lengths:
        """Of each row of a step the lengths of its documents; () where attention goes across them."""
        rows = self.step(step)
        return tuple(row.documents for row in rows) if rows[0].documents else ()

    def epochs(self, steps: int) -> tuple[float, ...]:
        """How often each source has been read after so many steps."""
        counts = self.mixture.before(steps * self.rows_a_step)
        return tuple(count / len(layout) for count, layout in zip(counts, self.layouts, strict=True))

    def imbalance(self, rows: Sequence[Row]) -> float:
        """Of a step's rows, the work of the dearest micro-batch over that of the mean one."""
        if self.work is None or not rows[0].documents:
            return 1.0
        work = self._work(rows).reshape(-1, self.microbatch_size).sum(1)
        return float(work.max() / work.mean())

    def told(self) -> list[str]:
        """In words, what is done with rows."""
        balanced = [f"balanced over {self.look_ahead} steps"] if self.look_ahead else []
        return balanced + (["attention keeps to each document"] if self.work else [])

    def used(self, rows: Sequence[Row]) -> Usage:
        """What a step with these rows reads."""
        tokens = sum(int(row.counts.sum()) for row in rows)
        imbalance = self.imbalance(rows)
        return Usage(1, len(rows), tokens, len(rows) * self.sequence_length - tokens, imbalance, imbalance)

    @functools.cached_property
    def mixture(self) -> Mixture:
        return Mixture(self.weights, self.seed)

    def _row(self, sequence: int) -> Row:
        """The row that stands at a sequence of the run, before any dealing."""
        source, before = self.mixture.source(sequence)
        layout = self.layouts[source]
        epoch, place = divmod(before, len(layout))
        number = Permutation(len(layout), self.seed, _EPOCH, source, epoch).at(place)
        return layout.row(number, source, drawn(self.seed, _OFFSET, source, epoch))

    def _light_ends(self, rows: list[Row]) -> list[Row]:
        """The same, each replica's cheapest micro-batches first and last and the dearest in the middle: ranks wait for the first
        one's forward and the last one's backward, where a pipeline fills and drains.
        """
        if self.work is None or not rows[0].documents:
            return rows
        work = self._work(rows).reshape(self.replicas, self.microbatches, self.microbatch_size).sum(2)
        found = []
        for replica, order in enumerate(np.argsort(work, axis=1, kind="stable")):
            for microbatch in (*order[::2], *order[1::2][::-1]):
                first = (replica * self.microbatches + int(microbatch)) * self.microbatch_size
                found += rows[first : first + self.microbatch_size]
        return found

    def _work(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """FLOPs of each row."""
        assert self.work is not None
        counts = [len(row.documents) for row in rows]
        each = self.work.of(np.array([length for row in rows for length in row.documents]))
        return np.bincount(np.repeat(np.arange(len(rows)), counts), each).astype(np.float64)

    @functools.cached_property
    def _latest(self) -> dict[int, list[list[int]]]:
        """The window of steps that was dealt last, which the next step asks for again."""
        return {}

    def _dealt(self, window: int) -> list[list[int]]:
        """Of each step of a window of steps, its sequences: neighbours in the order of what they cost, steps in a drawn order."""
        if window not in self._latest:
            self._latest.clear()
            self._latest[window] = self._deal(window)
        return self._latest[window]

    def _deal(self, window: int) -> list[list[int]]:
        size, steps = self.rows_a_step, self.look_ahead
        first = window * steps * size
        work = self._work([self._row(sequence) for sequence in range(first, first + steps * size)])
        order = np.argsort(work, kind="stable")
        found = []
        for place in Permutation(steps, self.seed, _STEPS, window)(np.arange(steps)).tolist():
            rows = np.sort(order[place * size : (place + 1) * size])
            found.append([
                first + int(rows[replica[row]])
                for replica in map(np.array, dealt(work[rows], self.replicas))
                for microbatch in dealt(work[rows][replica], self.microbatches)
                for row in microbatch
            ])  # fmt: skip
        return found
