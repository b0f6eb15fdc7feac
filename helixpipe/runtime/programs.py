"""Programs: what a step of these very micro-batches runs on a rank, made once and kept while it is used.

    batches ──► schedule ──► lowered for what this rank holds of them ──► Program, and Needs of (micro-batch, segment)

Documents make every step's batches new, so the next step's program can be made while this one runs. It is a function of
the batches alone: whoever makes it, and when, it is the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import torch

from helixpipe.errors import ConfigError
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping, Work, first_alike
from helixpipe.runtime.live import Needs
from helixpipe.schedule.lower import flops, lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule

# how many a pipeline keeps: steps and evaluations of a few lengths come again, documents hardly ever
MOST = 16
Batches = tuple[Batch, ...]
"""Of each micro-batch, whole over cp and tp."""
Arrange = Callable[[Batches], Schedule]
"""The schedule of a step's micro-batches."""
Key = TypeVar("Key")
Made = TypeVar("Made")


class Recent(Generic[Key, Made]):
    """The values last asked for, by key, as many as `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Key, Made] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._made

    def get(self, key: Key, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        self._made.move_to_end(key)
        while len(self._made) > self._most:
            self._made.popitem(last=False)
        return self._made[key]


class Step(NamedTuple):
    """A program, and what parts need in it."""

    program: Program
    by_microbatch: tuple[tuple[Needs, ...], ...]
    """And segment."""

    def needs(self, microbatch: int, segment: int) -> Needs:
        return self.by_microbatch[microbatch][segment]


class Programs:
    """Of one pipeline. `whole` and `here`: the model, and what one rank of a tp group holds of it; `local`: of a batch the
    tokens of one rank of a cp group. `arrange`: the schedule of a step where it depends on its micro-batches.
    """

    def __init__(
        self,
        schedule: Schedule,
        whole: ModelShape,
        here: ModelShape,
        local: Callable[[Batch], Batch],
        keeping: Keeping,
        dtype: torch.dtype,
        arrange: Arrange | None = None,
    ) -> None:
        self.schedule, self.whole, self.here, self.local = schedule, whole, here, local
        self.keeping, self.dtype, self.arrange = keeping, dtype, arrange
        self._steps: Recent[tuple[Batches, bool], Step] = Recent(MOST)
        self._coming: tuple[tuple[Batches, bool], Future[Step]] | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._lock = Lock()  # of what is coming: another thread may prepare while this one steps

    def of(self, batches: Batch | Sequence[Batch], training: bool) -> Step:
        """What these micro-batches run, one batch for all or of each its own. Raises ConfigError."""
        key = self._key(batches, training)
        with self._lock:
            coming = self._coming[1] if self._coming is not None and self._coming[0] == key else None
            if coming is not None:
                self._coming = None
        return self._steps.get(key, coming.result if coming is not None else lambda: self._made(*key))

    def prepare(self, batches: Batch | Sequence[Batch], training: bool = True) -> None:
        """Begin to make what `of` will be asked for next; what goes wrong is raised there."""
        key = self._key(batches, training)
        with self._lock:
            if key in self._steps or (self._coming is not None and self._coming[0] == key):
                return
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "helixpipe-programs")
            self._coming = key, self._worker.submit(self._made, *key)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _key(self, batches: Batch | Sequence[Batch], training: bool) -> tuple[Batches, bool]:
        each = (batches,) * self.schedule.microbatches if isinstance(batches, Batch) else tuple(batches)
        return each, training

    def _made(self, batches: Batches, training: bool) -> Step:
        schedule = self._arranged(batches)
        if not training:
            schedule = schedule.forward_only()
        alike = first_alike(batches)
        local = {first: self.local(batches[first]) for first in dict.fromkeys(alike)}
        # every rank divides the work alike, so the whole's orders messages
        program = lower(schedule, self.here, [local[first] for first in alike], flops(schedule, self.whole, batches))
        needs = {first: self._needs(batches[first], mine) for first, mine in local.items()}
        return Step(program, tuple(needs[first] for first in alike))

    def _needs(self, batch: Batch, mine: Batch) -> tuple[Needs, ...]:
        works = (
            (Work(self.whole, batch, segment, self.keeping), Work(self.here, mine, segment, self.keeping))
            for segment in range(self.schedule.segments)
        )
        return tuple(Needs(whole, here, self.dtype) for whole, here in works)

    def _arranged(self, batches: Batches) -> Schedule:
        if self.arrange is None:
            return self.schedule
        found = self.arrange(batches)
        if found.stages != self.schedule.stages or found.ranks_of != self.schedule.ranks_of:
            raise ConfigError(
                "arrange: gave a schedule with other stages, or stages on other ranks, than the pipeline was made with; change the "
                "order and places of micro-batches alone"
            )
        return found
