"""One step of a schedule, measured: the most bytes on the heap of each rank, beside what its timeline says.

Heap bytes are those beyond what stood before the step: weights, gradients and tables made lazily are there since a step
before it. A timeline's bytes, measured or predicted, are the most of all that it counts at one time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import heap

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting, estimate
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.timeline import Timeline
from helixpipe.runtime.forked import run_forked
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

HEAD_DIM = 32
VOCABULARY = 256
MEETING_S = 300.0
LIMIT_S = 600.0


@dataclass(frozen=True)
class Case:
    """A family of ours, or a name of torch's in `torch_pipelines`, and what it runs."""

    family: str
    recompute: str = "none"
    chunk: int = 0
    """Tokens at a time through the MLP and the head; 0 is all."""
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    layers: int = 8
    hidden: int = 128
    length: int = 4096
    microbatches: int = 4
    evaluates: bool = False
    """A forward without a backward."""
    model: dict[str, Any] = field(default_factory=dict)
    """What is other than in a GPT of these sizes: fields of ModelShape."""

    @property
    def is_torch(self) -> bool:
        return self.family.startswith("torch ")

    @property
    def shape(self) -> ModelShape:
        usual: dict[str, Any] = {
            "layers": self.layers, "hidden": self.hidden, "heads": self.hidden // HEAD_DIM, "ffn": 4 * self.hidden,
            "vocabulary": VOCABULARY, "mlp": "gelu", "norm": "layer",
        }  # fmt: skip
        return ModelShape(**(usual | self.model))

    @property
    def keeping(self) -> Keeping:
        return Keeping(self.recompute, 4, self.chunk, self.chunk)

    @property
    def schedule(self) -> Schedule:
        return build_schedule(
            self.family, ranks=self.ranks, layers=self.layers, microbatches=self.microbatches, **self.options
        )

    @property
    def setting(self) -> Setting:
        """Its machine decides how long messages are under way, and nothing else that is compared here."""
        machine, link = named_accelerator("laptop-core"), named_link("loopback")
        return Setting(self.shape, self.length, machine, link, self.keeping).of_family(self.family)

    def __str__(self) -> str:
        words = [self.family, *(f"{name} {value}" for name, value in self.options.items())]
        words += [] if self.is_torch else ["evaluation" if self.evaluates else f"recompute {self.recompute}"]
        words += [f"chunks of {self.chunk}"] * (self.chunk > 0) + ["one rank"] * (self.ranks == 1)
        usual = {"layers": 8, "hidden": 128, "length": 4096, "microbatches": 4}
        words += [f"{name} {getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        words += [f"{name} {value}" for name, value in self.model.items()]
        return ", ".join(words)


@dataclass(frozen=True)
class Peak:
    """One rank's most bytes at one time; None where nobody counts or predicts them."""

    heap_bytes: int
    timeline_bytes: int | None = None
    predicted_bytes: int | None = None
    standing_bytes: int = 0
    """Receive buffers among the heap's that torch's runtime keeps from step to step."""

    @property
    def heap_over_timeline(self) -> float | None:
        return self.heap_bytes / self.timeline_bytes if self.timeline_bytes else None

    @property
    def predicted_over_heap(self) -> float | None:
        return self.predicted_bytes / self.heap_bytes if self.predicted_bytes is not None else None


def peaks(cases: Sequence[Case], limit_s: float = LIMIT_S) -> list[list[Peak]]:
    """Of each case, each rank's. All run on the same fresh local ranks, one after the other, so they have as many.

    Raises NoMeter; RankError where a rank fails or takes too long.
    """
    with heap.metered():
        by_rank = run_forked(Steps(tuple(cases), limit_s))
    found = []
    for case, *measured in zip(cases, *by_rank, strict=True):
        each = zip(measured, predicted(case), strict=True)
        found.append([replace(peak, predicted_bytes=foreseen) for peak, foreseen in each])
    return found


def predicted(case: Case) -> Sequence[int | None]:
    """Each rank's most bytes in the predicted timeline; nobody predicts an evaluation's, or torch's."""
    if case.is_torch or case.evaluates:
        return [None] * case.ranks
    timeline = estimate(case.schedule, case.setting).timeline
    return [most(timeline, rank) for rank in range(case.ranks)]


def most(timeline: Timeline, rank: int) -> int:
    """The most bytes at one time, of all that points count."""
    return max(sum(point[1:]) for point in timeline.memory[rank])


@dataclass
class Steps:
    """The job of local ranks: each case's step, measured."""

    cases: tuple[Case, ...]
    limit_s: float

    @property
    def ranks(self) -> int:
        (ranks,) = {case.ranks for case in self.cases}
        return ranks

    def prepare(self) -> None:
        """All that ranks import, once."""
        import helixpipe.runtime.pipeline  # noqa: F401

        if any(case.is_torch for case in self.cases):
            import torch_pipelines  # noqa: F401

    def run(self, rank: int, store: Store) -> list[Peak]:
        """This rank's peak of each case."""
        return [self.measure(step) for step in self.steps(rank, store)]

    def steps(self, rank: int, store: Store) -> Iterator[Step]:
        """Each case's, after one that made all that is made lazily, and gradients."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if self.ranks > 1:
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=self.ranks, timeout=timedelta(seconds=MEETING_S)
            )
        for case in self.cases:
            generator = torch.Generator().manual_seed(0)
            sizes = (case.microbatches, case.length)
            tokens, targets = (torch.randint(VOCABULARY, sizes, generator=generator) for _ in range(2))
            yield from (_torchs if case.is_torch else _ours)(case, rank, tokens, targets)

    def measure(self, step: Step) -> Peak:
        """The leanest of its steps: what a busy machine keeps under way for longer comes on top."""
        found = [self._once(step) for _ in range(step.times)]
        return min(found, key=lambda peak: peak.heap_bytes)

    def _once(self, step: Step) -> Peak:
        found = heap.over_before(step.take)
        return Peak(found + step.standing_bytes, step.timeline_bytes(), standing_bytes=step.standing_bytes)


@dataclass
class Step:
    """Of a rank, ready to be taken."""

    take: Callable[[], object]
    timeline_bytes: Callable[[], int | None]
    """Of the last one taken. Collective."""
    standing_bytes: int = 0
    times: int = 1


def _ours(case: Case, rank: int, tokens: Tensor, targets: Tensor) -> Iterator[Step]:
    from helixpipe.model.decoder import Decoder
    from helixpipe.runtime.pipeline import Pipeline

    schedule = case.schedule
    lengths = case.setting.batch(schedule.segments).segment_lengths if schedule.segments > 1 else None
    model = Decoder(case.shape, mlp_chunk=case.chunk, head_chunk=case.chunk)
    pipeline = Pipeline(model, schedule, recompute=case.recompute, segment_lengths=lengths, timeout_s=MEETING_S)
    step = pipeline.evaluate if case.evaluates else pipeline.step
    step(tokens, targets)
    yield Step(lambda: step(tokens, targets), lambda: most(pipeline.timeline(), rank), times=2)
    pipeline.close()


def _torchs(case: Case, rank: int, tokens: Tensor, targets: Tensor) -> Iterator[Step]:
    from torch_pipelines import TorchPipeline

    pipeline = TorchPipeline(case.shape, case.microbatches, tokens, targets, case.family)
    pipeline.step()
    pipeline.let_go()
    yield Step(pipeline.step, lambda: None, pipeline.buffer_bytes)
