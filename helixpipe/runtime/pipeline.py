"""Pipeline: a model and a schedule on this rank, ready to step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store, _get_default_store

from helixpipe.errors import ConfigError, RankError
from helixpipe.model.decoder import Model
from helixpipe.model.layers import IGNORED
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.runtime.executor import execute
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.recorder import Recorder
from helixpipe.runtime.stages import Stages
from helixpipe.runtime.tape import POLICIES, Feed, Tape
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.runtime.weights import Weights
from helixpipe.schedule.action import Action
from helixpipe.schedule.check import check
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule
from helixpipe.shape import Batch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Pipeline:
    """Steps of a model under a schedule, one process per rank.

    Every rank makes one with the same arguments and calls the same methods. A schedule of one rank needs no
    process group. Gradients collect in `parameters` until `zero_gradients`.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        mesh: DeviceMesh | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        recompute: str = "selective",
        timeout_s: float = 300.0,
        segment_lengths: tuple[int, ...] | None = None,
    ) -> None:
        """`mesh` is one-dimensional, over the pipeline's ranks; None is all ranks of the default group.

        `dtype` is what parts compute in; the masters, their gradients and the optimizer stay float32 (float64
        for float64). `recompute`: none, full or selective (see `runtime.tape`). `segment_lengths`, in tokens: of a
        schedule with segments. Raises ConfigError, ScheduleError.
        """
        check(schedule)
        if recompute not in POLICIES:
            raise ConfigError(f"runtime.recompute: '{recompute}' is not known; known: {', '.join(POLICIES)}")
        _check_segments(model, schedule, segment_lengths)
        self.segment_lengths = segment_lengths
        self.model, self.schedule, self.device = model, schedule, torch.device(device)
        self.group = mesh.get_group() if mesh is not None else (dist.group.WORLD if dist.is_initialized() else None)
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.ranks = dist.get_world_size(self.group) if self.group is not None else 1
        if self.ranks != len(schedule.ranks):
            raise ConfigError(
                f"schedule.ranks: the schedule has {len(schedule.ranks)} ranks and {self.ranks} are running; start as many"
            )
        self._weights = Weights(model, schedule, self.rank, self.device, dtype)
        self._watch = Watch(_store() if self.group is not None else None, self.rank, self.ranks)
        self._transport = Transport(self.group, self.device, dtype, self._weights.master_dtype, timeout_s, self._watch)
        self._ledger = Ledger(self._weights.is_parameter)
        self._tapes = {
            s: Tape(stage, self._weights.modules, recompute, self._ledger)
            for s, stage in enumerate(schedule.stages)
            if self.rank in schedule.ranks_of[s]
        }
        self._recorder = Recorder(self.device)
        self._programs: dict[tuple[Batch, bool], Program] = {}
        self._last: Program | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The masters this rank owns, by full name."""
        return self._weights.masters

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward and backward of one batch; the mean loss per target token, the same on every rank.

        `tokens`, `targets`: int64 [microbatches * microbatch_size, s], the same on every rank; a target of
        -100 does not count. Gradients are added to those in `parameters`.
        """
        return self._run(tokens, targets, training=True)

    def evaluate(self, tokens: Tensor, targets: Tensor) -> float:
        """The loss of one batch, as `step` gives it, and nothing else."""
        return self._run(tokens, targets, training=False)

    def zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def clip_gradients(self, max_norm: float) -> float:
        """The norm of all gradients of all ranks, which are scaled down to `max_norm` when it is above.

        Collective. Norms are added in rank order, so the result is the same everywhere and every time.
        """
        gradients = [p.grad for _, p in sorted(self.parameters.items()) if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        squared = float(torch.stack(norms).square().sum()) if norms else 0.0
        self._watch.doing = "the norm of all gradients"
        norm = math.sqrt(sum(row[0] for row in self._gathered([squared])))
        if norm > max_norm:
            for gradient in gradients:
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def timeline(self) -> Timeline:
        """Measured timeline of the last step, all ranks. Collective."""
        mine = self._recorder.spans(), self._recorder.memory()
        everyone: list[tuple[tuple[Span, ...], tuple[MemoryPoint, ...]] | None] = [None] * self.ranks
        if self.group is None:
            everyone = [mine]
        else:
            with_names = [(*map(str, span[:1]), *span[1:]) for span in mine[0]], [tuple(p) for p in mine[1]]
            gathered: list[tuple[list[tuple[str, float, float, str]], list[tuple[float, int, int]]]] = [
                ([], [])
            ] * self.ranks
            dist.all_gather_object(gathered, with_names, self.group)
            everyone = [
                (
                    tuple(Span(Action.parse(a), s, e, w) for a, s, e, w in spans),
                    tuple(MemoryPoint(*point) for point in points),
                )
                for spans, points in gathered
            ]
        return Timeline(tuple(each[0] for each in everyone if each), tuple(each[1] for each in everyone if each))

    @property
    def last_program(self) -> Program:
        """What the last step ran."""
        assert self._last is not None, "no step was taken yet"
        return self._last

    def program(self, batch: Batch, training: bool = True) -> Program:
        """The program of a batch's shape: lowered once."""
        key = batch, training
        if key not in self._programs:
            schedule = self.schedule if training else self.schedule.forward_only()
            self._programs[key] = lower(schedule, self.model.shape, batch)
        return self._programs[key]

    def close(self) -> None:
        """Stop this rank's threads: it will not step again."""
        self._watch.close()
        self._transport.close()

    def _run(self, tokens: Tensor, targets: Tensor, training: bool) -> float:
        batch = self._batch(tokens, targets)
        self._last = program = self.program(batch, training)
        counted = int((targets != IGNORED).sum())
        scale = 1.0 / max(counted, 1)
        stages = Stages(
            program, self._tapes, self._weights, self._ledger, self._feeds(tokens, targets, batch), scale, training
        )
        self._watch.doing = "the start of a step"
        self._gathered([0.0])  # clocks start together
        execute(program.ranks[self.rank], stages, self._weights, self._transport, self._recorder, self._watch)
        loss = sum((float(stages.losses[key].double()) for key in sorted(stages.losses)), 0.0) * scale
        loss = math.fsum(row[0] for row in self._gathered([loss]))
        self._watch.doing = "work between steps"
        return loss

    def _batch(self, tokens: Tensor, targets: Tensor) -> Batch:
        m = self.schedule.microbatches
        if tokens.dim() != 2 or tokens.shape != targets.shape:
            raise ConfigError(
                f"tokens {list(tokens.shape)}, targets {list(targets.shape)}: give both as [sequences, tokens]"
            )
        if tokens.shape[0] % m:
            raise ConfigError(f"tokens: {tokens.shape[0]} sequences do not divide into {m} micro-batches")
        lengths = self.segment_lengths or (tokens.shape[1],)
        if sum(lengths) != tokens.shape[1]:
            raise ConfigError(
                f"tokens: {tokens.shape[1]} a sequence, and the segments {list(lengths)} add up to {sum(lengths)}"
            )
        return Batch(tokens.shape[0] // m, lengths)

    def _feeds(self, tokens: Tensor, targets: Tensor, batch: Batch) -> dict[tuple[int, int], Feed]:
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        feeds = {}
        for mb in range(self.schedule.microbatches):
            rows = slice(mb * batch.microbatch_size, (mb + 1) * batch.microbatch_size)
            for seg, length in enumerate(batch.segment_lengths):
                start = batch.start(seg)
                here = slice(start, start + length)
                feeds[mb, seg] = Feed(tokens[rows, here], targets[rows, here], start, seg)
        return feeds

    def _gathered(self, mine: list[float]) -> list[list[float]]:
        """Every rank's numbers, by rank."""
        if self.group is None:
            return [mine]
        row = torch.tensor(mine, dtype=torch.float64, device=self._wire)
        rows = [torch.empty_like(row) for _ in range(self.ranks)]
        try:
            dist.all_gather(rows, row, self.group)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank}, at {self._watch.doing}, lost a rank while waiting for all of them; {self._watch.others()}"
            ) from error
        return [r.tolist() for r in rows]

    @property
    def _wire(self) -> torch.device:
        return self.device if dist.get_backend(self.group) == "nccl" else torch.device("cpu")


def _check_segments(model: Model, schedule: Schedule, lengths: tuple[int, ...] | None) -> None:
    """A sequence can be cut only where what comes later does not matter, and where its state is known."""
    if schedule.segments == 1:
        return
    if lengths is None or len(lengths) != schedule.segments or min(lengths) < 1:
        raise ConfigError(
            f"segment_lengths: {lengths}; the schedule has {schedule.segments} segments: give as many lengths, none 0"
        )
    if not model.shape.causal:
        raise ConfigError(
            "model.causal: false; a segment of bidirectional attention needs the segments after it: use helix, or one segment"
        )
    block = next((part for stage in schedule.stages for part in stage.parts if part.kind == "block"), None)
    if block is not None:
        raise ConfigError(
            f"schedule.segments: {block} is opaque, so what it carries from segment to segment is not known"
        )


def _store() -> Store:
    """The run's store, on a connection of its own: the watch must not wait for anyone else's requests."""
    return _get_default_store().clone()  # type: ignore[attr-defined, no-any-return]
