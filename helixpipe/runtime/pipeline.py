"""Pipeline: a model and a schedule on this rank, ready to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store, _get_default_store

from helixpipe.errors import ConfigError, RankError
from helixpipe.mesh import MeshShape
from helixpipe.model.chunked import Chunked
from helixpipe.model.decoder import Model
from helixpipe.model.head import takes_weights
from helixpipe.parts.part import loss_of
from helixpipe.parts.work import Batch, Keeping, Lengths
from helixpipe.predict.hardware import Communicators, check_communicators
from helixpipe.predict.timeline import Span, Timeline
from helixpipe.runtime.attention_kernel import give
from helixpipe.runtime.buffers import Buffers
from helixpipe.runtime.compiled import Compiler
from helixpipe.runtime.context import Context
from helixpipe.runtime.documents import Given, document_lengths
from helixpipe.runtime.executor import execute
from helixpipe.runtime.garbage import uncollected
from helixpipe.runtime.gradient_norm import clip, norm_of, squares
from helixpipe.runtime.losses import Counted, Losses, check_head, check_weights, divisor, of_rank, of_ranks
from helixpipe.runtime.mesh import Mesh
from helixpipe.runtime.modules import Modules
from helixpipe.runtime.nonfinite import search
from helixpipe.runtime.programs import Arrange, Programs
from helixpipe.runtime.randomness import Stream, evaluating
from helixpipe.runtime.recorder import Recorder, of_all
from helixpipe.runtime.reduction import Reduction
from helixpipe.runtime.same import check_same
from helixpipe.runtime.shards import Shards
from helixpipe.runtime.shares import Shares
from helixpipe.runtime.stages import Stages
from helixpipe.runtime.suited import check_attention, check_positions, check_segments, check_vocabulary
from helixpipe.runtime.tape import POLICIES, Tape
from helixpipe.runtime.tensor import TensorParallel
from helixpipe.runtime.transport import Transport
from helixpipe.runtime.weights import Weights
from helixpipe.runtime.words import Told, Word, flagged, flags, numbers, told
from helixpipe.schedule.action import Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.lower import lower
from helixpipe.schedule.partition import Cut, as_training
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Say = Callable[[], Sequence[float]]


def _nothing() -> Sequence[float]:
    return ()


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
        segment_lengths: Sequence[int] | Cut | None = None,
        context_method: str = "ring",
        layout: str = "zigzag",
        arrange: Arrange | None = None,
        communicators: Communicators = "direction",
        compiled: bool = False,
        attention: str = "auto",
    ) -> None:
        """`mesh`: dimensions named pp, dp, cp, tp, as few as there are; without names it is all pp, and None is all
        ranks of the default group. `context_method` (ring or ulysses) and `layout` (zigzag, striped or plain, of a
        ring): how cp ranks share a sequence.

        `dtype` is what parts compute in; the masters, their gradients and the optimizer stay float32 (float64
        for float64). `recompute`: none, full or selective (see `runtime.tape`). `segment_lengths`, in tokens: of a
        schedule with segments, over all cp ranks; when not given, segments of as much computation each, as training cuts
        them, of each micro-batch by its documents; or a function of a sequence's tokens and a micro-batch's documents (of
        each of its sequences their lengths, () where none has several). `arrange`: the schedule of a step's micro-batches,
        where their order and places depend on what they cost. `communicators`: of NCCL, one a direction of a pair of ranks, or
        one a pair (see `runtime.channels`). `compiled`: see `runtime.compiled`. `attention`: CUDA's kernel, see
        `runtime.attention_kernel`. Raises ConfigError, ScheduleError.
        """
        check(schedule)
        if recompute not in POLICIES:
            raise ConfigError(f"runtime.recompute: '{recompute}' is not known; known: {', '.join(POLICIES)}")
        check_communicators(communicators, "runtime.communicators")
        given = None if segment_lengths is None or callable(segment_lengths) else tuple(segment_lengths)
        check_segments(model, schedule, given)
        check_vocabulary(model, schedule)
        self.model, self.schedule, self.device, self.dtype = model, schedule, torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # events, kernels and gathered objects go to the current one
        self.mesh = Mesh(mesh, timeout_s, self.device)
        self.group, self.rank, self.ranks = self.mesh.group("pp"), self.mesh.here.pp, self.mesh.shape.pp
        if self.ranks != len(schedule.ranks):
            raise ConfigError(
                f"schedule.ranks: the schedule has {len(schedule.ranks)} ranks and {self.ranks} are running; start as many"
            )
        self._divided = MeshShape(*self.mesh.shape, context_method, layout)
        self._divided.check(model.shape, given or ())
        cp, tp = self.mesh.group("cp"), self.mesh.group("tp")
        self._tensor = None if tp is None else TensorParallel(tp, model.shape)
        context = None if cp is None else Context(cp, context_method, layout)
        cut = segment_lengths if callable(segment_lengths) else self._cut(given, recompute)
        self._shares = Shares(self.mesh, context, schedule.microbatches, cut, self.device)
        modules = Modules(model, schedule, self.rank, self.device, dtype, self._tensor, self.mesh.told)
        self._shape, self._weights, self._of_one_document = modules.shape, Weights(modules), modules.of_one_document
        check_attention(self._weights.modules, schedule.segments)
        self.attention = give(attention, self._weights.modules.values(), self.device, dtype, modules.shape)
        """What computes attention on CUDA, in words; "" on a CPU."""
        compiler = Compiler(self.device, compiled)
        for part, module in self._weights.modules.items():
            if context is not None:
                context.join(part, module)
            compiler.take(module)
            for inner in module.modules():
                if isinstance(inner, Chunked):
                    inner.shards = self.mesh.shape.cp * self.mesh.shape.tp
        self._watch = self.mesh.watch(_store() if self.mesh.everyone is not None else None)
        check_same(model, self.mesh, self._watch)
        self._buffers = Buffers(modules, self.mesh, self._watch, recompute)
        self._cuts = self._tensor.cuts if self._tensor else frozenset[str]()
        self._reduction = Reduction(self.parameters, self._cuts, self.mesh, self._watch)
        self._ledger = self._weights.ledger
        self._transport = Transport(
            self.group,
            self.device,
            dtype,
            self._weights.master_dtype,
            timeout_s,
            self._watch,
            self._ledger,
            communicators,
        )
        if not self._transport.tags:  # which pairs there are, any batch tells
            program = lower(schedule, self._shape, model.shape.example(schedule.segments))
            self._transport.meet(program.messages, self.mesh.lines)
        collect = self._weights.multiply_in if self._weights.adds_wide else None
        splits = any(action.kind is Pass.I for order in schedule.ranks for action in order)
        self._tapes = {
            s: Tape(stage, self._weights.modules, recompute, self._ledger, schedule.outputs[s], collect, splits)
            for s, stage in enumerate(schedule.stages)
            if self.rank in schedule.ranks_of[s]
        }
        self._recorder, self._timeout_s = Recorder(self.device), timeout_s
        self._watch.reached = self._recorder.at
        self.keeping = Keeping(
            recompute, dtype.itemsize, *_chunks_of(model), self.device.type, tensor_parallel=self.mesh.shape.tp,
            threads=torch.get_num_threads(), processes=self.mesh.shape.cp * self.mesh.shape.tp,
        )  # fmt: skip
        self._head = next(part for part in schedule.parts if loss_of(schedule.layers) in part.makes)
        self._takes_weights = False
        self._programs = Programs(
            schedule, model.shape, self._shape, self._shares.local, self.keeping, dtype, arrange
        )  # fmt: skip
        self._seed = torch.initial_seed()
        self.steps = 0
        """Steps so far, of which random numbers are a function: set it where a run goes on."""
        self.told: Told | None = None
        """What all ranks told of the last step."""
        self._last: Program | None = None
        self._gathered([0.0])  # a moment that all ranks share
        self._recorder.meet()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The masters this rank owns, by full name. Frozen ones too: `requires_grad` says which are trained."""
        return self._weights.masters

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of the parts this rank owns, by full name: what a checkpoint has beside parameters."""
        return self._buffers.persistent()

    def shards(self) -> Shards:
        """For an optimizer whose state is divided over replicas: which masters to update here, and how they are shared."""
        return Shards(self.parameters, self.mesh, self._watch)

    def step(
        self,
        tokens: Tensor,
        targets: Tensor,
        counted: Counted = None,
        weights: Tensor | None = None,
        documents: Given = None,
        clip_norm: float | None = None,
        say: Say = _nothing,
    ) -> float:
        """Forward and backward of one batch; the mean loss per target that counts, the same on every rank.

        `tokens`, `targets`: int64 [dp * microbatches * microbatch_size, s], whole and the same on every rank of the
        mesh; a target of -100 does not count. Gradients, of the whole batch, are added to those in `parameters`.

        `counted`: what the loss is divided by, for several steps before one update: how many targets count in all of
        them together (`helixpipe.counted`). Losses and gradients of the steps then add up to those of one step with all
        their sequences; without it each step adds a mean of its own, however few targets it has. A mask, bool like targets,
        stands for how many it has of true.

        `weights`: float32 like targets, what each loss is multiplied by before all are added up; they change nothing of what
        the sum is divided by. A z-loss is weighted too.

        `documents`: where sequences hold several, of each sequence of the batch the lengths of its documents in tokens,
        `[[5, 7], [12]]`; or an id a token, int64 [sequences, s]; or `helixpipe.sequence.Documents`. Like tokens they are whole
        and the same on every rank. No token attends to another document, and positions start anew in each, as does what a
        rotary scaling makes of the length. Targets are as they were: a document's last token predicts what its target says,
        -100 for nothing. None: a sequence is one document. Parts of someone else's that attend or read positions are refused.

        `clip_norm`: what `clip_gradients` would do next, without an exchange of its own. `say`: asked at the step's end for
        numbers of this rank's, as many on each. `Pipeline.told` has what came of both, and what the step took.

        Raises ConfigError for a batch that cannot be, or one that has more than `counted`; warns with UncountedWarning
        where nothing counts: the loss is 0 then, and gradients get nothing.
        """
        scale = 1.0 / divisor(targets, counted)
        lengths = self._documents(tokens, documents)
        rows = self._run(tokens, targets, scale, True, weights, lengths, clip_norm, say)
        self.told = told(rows, self.mesh.places, self._watch.line, clip_norm is not None)
        if clip_norm is not None:
            clip(self.parameters, self.told.gradient_norm, clip_norm)
        return self.told.loss

    def evaluate(
        self,
        tokens: Tensor,
        targets: Tensor,
        counted: Counted = None,
        weights: Tensor | None = None,
        documents: Given = None,
    ) -> float:
        """The loss of one batch, as `step` gives it, and nothing else."""
        scale = 1.0 / divisor(targets, counted)
        lengths = self._documents(tokens, documents)
        return math.fsum(row[0] for row in self._run(tokens, targets, scale, False, weights, lengths))

    def losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        counted: Counted = None,
        weights: Tensor | None = None,
        documents: Given = None,
    ) -> Losses:
        """The losses of one batch, as sums in all and by position in the document, the same on every rank.

        Sums of any batches, on any mesh and schedule, add up to the same: `Losses.joined`. A head that gives one sum leaves
        positions unknown, and `Losses.without` says so. `counted`: the mask of what counts, where that is more than the targets.
        """
        lengths = self._documents(tokens, documents)
        rows = self._run(tokens, targets, 1.0, False, weights, lengths)
        more = len(Word._fields)
        return of_ranks([(row[0], row[more:]) for row in rows], targets, self._head, counted, lengths)

    def first_nonfinite(self, **batch: Any) -> str:
        """What made the first value that is no finite number in the last step, which was given `batch`: "layer 3's mlp, on rank
        1, micro-batch 2, forward", or "" where none comes again. Takes that step once more, and leaves no gradients. Collective.
        """
        self.steps -= 1  # the same random numbers
        parts, segments = self.schedule.parts, self.schedule.segments
        with self.together("the search for a value that is not finite"):
            return search(lambda: self.step(**batch), self._tapes.values(), self._weights, parts, self.mesh, segments)

    def zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def clip_gradients(self, max_norm: float) -> float:
        """The norm of all gradients of all ranks, which are scaled down to `max_norm` when it is above.

        Collective. Every parameter counts once, on however many ranks it is. Norms are added in rank order, so the
        result is the same everywhere and every time.
        """
        self._watch.doing = "the norm of all gradients"
        mine = numbers(squares(self.parameters, self._cuts, self.device))
        norm = norm_of([(divided, whole) for divided, whole in self._gathered(mine)], self.mesh.places)
        clip(self.parameters, norm, max_norm)
        return norm

    def as_whole(self, name: str, mine: Tensor) -> Tensor:
        """A tensor of a parameter's shape (itself, a moment) as this rank's part of the whole, on the same memory.

        For torch.distributed.checkpoint: a DTensor where tp divides the parameter, else the tensor.
        """
        return mine if self._tensor is None else self._tensor.as_whole(name, mine, self.mesh.line("tp"))

    def timeline(self) -> Timeline:
        """Measured timeline of the last step, all ranks of this rank's pipeline. Collective."""
        found = self._timeline(everywhere=True)
        assert found is not None
        return found

    def timeline_on_first(self) -> Timeline | None:
        """The same on the first rank of each pipeline, None on the others. Collective."""
        return self._timeline(everywhere=False)

    def _timeline(self, everywhere: bool) -> Timeline | None:
        with self.together("the timeline"):
            return of_all(self._recorder, self.group, everywhere)

    def spans(self) -> tuple[Span, ...]:
        """What this rank did in the last step."""
        return self._recorder.spans()

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Around what all ranks do at once: a rank lost in it is a RankError that says what the others were doing."""
        self._watch.doing = doing
        with self._watch.together():
            yield
        self._watch.doing = "work between steps"

    def wait_for(self, doing: str, done: Future[T]) -> T:
        """What a thread of every rank is to give, however long it takes: a checkpoint's. Raises RankError where a rank is lost
        meanwhile, or is not heard of for `timeout_s`.
        """
        with self.together(doing):
            return self._watch.patient(done, self._timeout_s)

    @property
    def last_program(self) -> Program:
        """What the last step ran."""
        assert self._last is not None, "no step was taken yet"
        return self._last

    def program(self, batches: Batch | Sequence[Batch], training: bool = True) -> Program:
        """The program of a step's micro-batches, whole over cp and tp, one batch for all or of each its own: lowered once."""
        return self._programs.of(batches, training).program

    def prepare(self, sequences: int, length: int, documents: Given = None) -> None:
        """Begin to make the program of the next step, in a thread, while this one runs: of so many sequences of so many tokens.

        Any thread may ask. Raises ConfigError as that step would.
        """
        like = torch.empty(sequences, length, device="meta")
        whole = self._shares.batch(like, like)
        self._programs.prepare(self._shares.batches(whole, self._documents(like, documents)), training=True)

    def close(self) -> None:
        """Stop this rank's threads: it will not step again."""
        self._programs.close()
        self._watch.close()
        self._transport.close()

    def _documents(self, tokens: Tensor, given: Given) -> Lengths:
        """Those of the batch's sequences. Raises ConfigError for what does not cover them, and for parts that know of none."""
        found = document_lengths(given, *tokens.shape) if tokens.dim() == 2 else ()
        if found and self._of_one_document:
            raise ConfigError(self._of_one_document)
        return found

    @uncollected()
    def _run(
        self,
        tokens: Tensor,
        targets: Tensor,
        scale: float,
        training: bool,
        weights: Tensor | None,
        documents: Lengths,
        clip_norm: float | None = None,
        say: Say = _nothing,
    ) -> list[list[float]]:
        """Of each rank its `Word`, whose loss is times `scale`; behind it, of an evaluation, what `losses.of_rank` says, and at last
        what `say` gave.
        """
        batch = self._shares.batch(tokens, targets)
        self._check_weighed(weights, targets)
        check_positions(self.model, batch, documents)
        batches = self._shares.batches(batch, documents)
        for lengths in dict.fromkeys(each.segment_lengths for each in batches):
            self._divided.check(self.model.shape, lengths)
        step = self._programs.of(batches, training)
        self._last = program = step.program
        feeds = self._shares.feeds(tokens, targets, batches, weights)
        stages = Stages(
            program,
            self._tapes,
            self._weights,
            self._ledger,
            feeds,
            scale,
            training,
            step.needs,
            self._stream,
        )
        self._watch.doing = "the start of a step"
        self._buffers.begin()
        bare = self._weights.bare()
        self._reduction.begin()
        try:
            with nullcontext() if training else evaluating(self._weights.modules.values()):
                execute(program.ranks[self.rank], stages, self._weights, self._transport, self._recorder, self._watch)
        except RankError as error:
            raise self._watch.placed(error) from error
        self._reduction.finish()
        self._watch.doing = "the end of the step"
        self._recorder.settle(self._timeout_s, self._watch)
        losses = [stages.losses[key].double() for key in sorted(stages.losses)]
        norm = squares({} if clip_norm is None else self.parameters, self._cuts, self.device)
        by_position = norm[:0] if training else of_rank(losses, tokens.shape[1], self.device)
        divided, whole, *more = numbers(norm, by_position, *(each.sum() for each in losses))
        more, each = more[: len(by_position)], more[len(by_position) :]
        said = say()
        word = Word(
            sum(each, 0.0) * scale, self._buffers.end(training), divided, whole, *self._recorder.summary(), len(said)
        )
        names = program.returning
        rows = self._gathered([*word, *more, *flags(self._weights.used(names)), *said])
        self._recorder.meet()
        self._buffers.settle([row[1] for row in rows])
        if training and names:
            self._weights.settle(bare, flagged(names, rows))
        self.steps += training
        self._watch.doing = "work between steps"
        return rows

    def _check_weighed(self, weights: Tensor | None, targets: Tensor) -> None:
        """Raise ConfigError, on every rank, for weights that cannot be or that the head cannot take. Collective at first."""
        check_weights(weights, targets)
        if weights is not None and not self._takes_weights:
            head = self._weights.modules.get(self._head)
            mine = head is None or takes_weights(head.forward)
            check_head(all(took for (took,) in self._gathered([float(mine)])), self._head)
            self._takes_weights = True

    def _cut(self, lengths: tuple[int, ...] | None, recompute: str) -> Cut:
        """Tokens of a sequence, and a micro-batch's documents -> tokens of its segments."""
        if lengths is not None:
            return lambda length, documents: lengths
        shape, segments, unit = self.model.shape, self.schedule.segments, self._divided.unit
        return lambda length, documents: as_training(shape, length, segments, recompute, unit, documents)

    def _stream(self, microbatch: int, segment: int) -> Stream:
        here = self.mesh.here
        whole = here.dp * self.schedule.microbatches + microbatch
        return Stream(self._seed, self.steps, whole, segment, (here.cp, here.tp))

    def _gathered(self, mine: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, in the order of `mesh.places`."""
        return self.mesh.gathered(mine, self._watch)


def _chunks_of(model: Model) -> tuple[int, int]:
    """Tokens at a time through the MLP and the head, where a model says so."""
    recipe = getattr(model, "recipe", None)
    return (recipe.mlp_chunk, recipe.head_chunk) if recipe is not None else (0, 0)


def _store() -> Store:
    """The run's store, on a connection of its own: the watch must not wait for anyone else's requests."""
    return _get_default_store().clone()  # type: ignore[attr-defined, no-any-return]
