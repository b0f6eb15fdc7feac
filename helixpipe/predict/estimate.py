"""Estimate: a schedule priced for a model, a sequence length and a machine. What every prediction goes through.

Setting (model, length, accelerator, link, what is kept) ─┐
family, options ──► build ──► Schedule ──► lower ──► Program ──► simulate ──► Timeline
                     └ balanced by the same costs                 └ seconds, bytes a rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.hub.folder import model_shape
from helixpipe.mesh import MeshShape
from helixpipe.parts.part import ends, layer_parts
from helixpipe.parts.shape import ModelShape, Shaped, shape_of
from helixpipe.parts.work import Batch, Keeping, first_alike
from helixpipe.predict import building
from helixpipe.predict.cost import Analytic, PartCosts, accelerator_bytes, action_seconds
from helixpipe.predict.hardware import Accelerator, Link, named_accelerator, named_link
from helixpipe.predict.nodes import Links, Nodes
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.standing import Elements, dealt, owned_and_visiting, standing_bytes, trained
from helixpipe.predict.timeline import MemoryPoint, Timeline
from helixpipe.schedule import families
from helixpipe.schedule.action import Action
from helixpipe.schedule.check import check
from helixpipe.schedule.lower import lower
from helixpipe.schedule.partition import MULTIPLE, Documents, even, for_shape, from_costs, refuse_bidirectional
from helixpipe.schedule.program import Message, Program
from helixpipe.schedule.schedule import Schedule

# what cannot be drawn or priced in a reasonable time and memory
MOST_ACTIONS = 2_000_000


def check_actions(actions: int) -> None:
    """Raise ConfigError for more than can be priced."""
    if actions > MOST_ACTIONS:
        raise ConfigError(f"up to {actions:,} actions are more than fit here ({MOST_ACTIONS:,}); ask for fewer")


@dataclass(frozen=True)
class Setting:
    """What a schedule is priced for."""

    shape: ModelShape
    sequence_length: int
    accelerator: Accelerator = field(default_factory=lambda: named_accelerator("ideal"))
    link: Link = field(default_factory=lambda: named_link("free"))
    """Between pipeline ranks."""
    keeping: Keeping = field(default_factory=lambda: Keeping("selective", 2))
    microbatch_size: int = 1
    tensor_parallel: int = 1
    """Accelerators that share the matrices of a rank."""
    tensor_link: Link | None = None
    """Between these; None is free."""
    context_parallel: int = 1
    """Such groups that share its sequences; joined by `link`."""
    data_parallel: int = 1
    """Pipelines side by side, each with micro-batches of its own; gradients are summed once a step, over `link`."""
    profile: PartCosts | None = None
    """Measured costs, in place of the accelerator's rates."""
    partition: str = "auto"
    """computation_wise, even, or auto: the family's own (`of_family`), computation_wise where none is known."""
    evenness: float = 0.0
    segment_multiple: int = MULTIPLE
    context_method: str = "ring"
    layout: str = "zigzag"
    """How context-parallel ranks share a sequence; a ring's messages are priced for both."""
    optimizer: str = "replicated"
    """sharded: replicas divide its state (ZeRO-1)."""
    megatron: bool = False
    """Megatron's tensor parallelism in place of this runtime's: the vocabulary is divided as well, so that embedding and
    head exchange x inside the group too, and what was gathered is not kept but gathered again."""
    nodes: Nodes | None = None
    """Where accelerators stand; it says all links then, those of tensor and context parallelism too."""
    pipeline_ranks: int = 1
    """Of nodes: how many pipeline ranks there are, from which follows who is in one."""

    def __post_init__(self) -> None:
        divides = 1 if self.megatron else self.tensor_parallel
        keeps = replace(self.keeping, tensor_parallel=divides, processes=self.group)
        object.__setattr__(self, "keeping", keeps)
        for name in ("sequence_length", "microbatch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; give at least 1")
        self._check((self.sequence_length,))

    @cached_property
    def costs(self) -> PartCosts:
        if self.profile is not None:
            if self.group > 1:
                raise ConfigError("profile: measured on one device alone; leave tp and cp at 1")
            if self.shape.opaque and isinstance(getattr(self.profile, "shape", None), ModelShape):
                raise ConfigError(
                    "profile: measured of a decoder's parts, and this model's layers are its own; leave it away"
                )
            return self.profile
        return Analytic(
            self.shape, self.accelerator, self.keeping.element_bytes, self.tensor_parallel, self.tensor_link,
            self.context_parallel, self.link if self.links is None else self.links.context, self.megatron, self.context_method,
        )  # fmt: skip

    @cached_property
    def mesh(self) -> MeshShape:
        return MeshShape(
            self.pipeline_ranks, self.data_parallel, self.context_parallel, self.tensor_parallel, self.context_method,
            self.layout,
        )  # fmt: skip

    @cached_property
    def links(self) -> Links | None:
        """Where accelerators stand in nodes, the links of each direction."""
        return None if self.nodes is None else self.nodes.links(self.mesh)

    def on_nodes(self, nodes: Nodes, pipeline_ranks: int) -> Setting:
        """With the links that so many pipeline ranks have in these nodes."""
        placed = replace(self, nodes=nodes, pipeline_ranks=pipeline_ranks)
        assert placed.links is not None
        communicators = self.link.communicators
        between = replace(placed.links.pipeline, communicators=communicators)
        return replace(placed, link=between, tensor_link=placed.links.tensor)

    def link_between(self, src: int, dst: int) -> Link:
        """Of two pipeline ranks."""
        links = self.links
        if links is None or src // links.neighbours != dst // links.neighbours:
            return self.link
        return links.inside

    @property
    def machine(self) -> str:
        """What actions are priced by."""
        return "measured costs" if self.profile else self.accelerator.name

    @property
    def only_ratios(self) -> bool:
        """Whether seconds mean something only beside one another: no machine was named, and none measured."""
        return self.profile is None and self.accelerator.only_ratios

    @property
    def group(self) -> int:
        """Accelerators that are one rank together."""
        return self.tensor_parallel * self.context_parallel

    @cached_property
    def share(self) -> ModelShape:
        """What one accelerator of a rank holds of the parameters."""
        share = self.shape.tensor_share(self.tensor_parallel)
        return replace(share, vocabulary=math.ceil(share.vocabulary / self.tensor_parallel)) if self.megatron else share

    @cached_property
    def whole(self) -> Batch:
        """A micro-batch whose sequences are not cut."""
        return Batch(self.microbatch_size, (self.sequence_length,))

    @cached_property
    def balance(self) -> dict[str, tuple[float, ...]]:
        """What families balance by, in forwards of a layer: embed and head; F, I and W of a layer.

        In FLOPs where nothing was measured, whatever the accelerator: training, which is told of none, does the same.
        Rounded here, once, so that plan, simulate and training build one schedule.
        """
        costs, shape = self.balancing, self.shape
        # blocks may differ, and so may windows: the mean of all stands for one
        layers = shape.layers if shape.opaque or len(shape.windows) > 1 else 1
        parts = [part for layer in range(layers) for part in layer_parts(layer, layer in shape.opaque)]
        forward = {part: costs.forward_s(part, self.whole, 0) for part in parts}
        layer = math.fsum(forward.values()) / layers
        again = math.fsum(s for part, s in forward.items() if self.keeping.runs_again(part)) / layers
        inputs = math.fsum(costs.input_s(part, self.whole, 0) for part in parts) / layers
        weights = math.fsum(costs.weight_s(part, self.whole, 0) for part in parts) / layers
        embed, head = (costs.forward_s(part, self.whole, 0) for part in ends(shape.layers))
        if not layer:
            return {}  # layers without a FLOP: there is nothing to balance by
        weights = weights or layer / 1000  # of a block everything is I, and families want a W of some length
        found = {"ends": (embed, head), "costs": (layer, inputs + again, weights)}
        # to three digits, not decimals: where attention is nearly all, W is little but never nothing
        return {name: tuple(float(f"{each / layer:.3g}") for each in times) for name, times in found.items()}

    @cached_property
    def layer_costs(self) -> tuple[float, ...]:
        """What each layer costs, in those of the mean layer; none where all are alike."""
        return building.layer_costs(self, self.balancing)

    @property
    def balancing(self) -> PartCosts:
        """What families are balanced by."""
        return self.profile or Analytic(self.shape, named_accelerator("ideal"))

    def attention_costs(self, batches: Sequence[Batch]) -> tuple[float, ...]:
        """What each micro-batch's attention costs, forward: the `work` by which a family places them, as `balance` measures."""
        costs, alike = self.balancing, first_alike(batches)
        parts = {layer: [p for p in layer_parts(layer) if p.about.attends] for layer in self.shape.sorts()}

        def total(batch: Batch) -> float:
            shares = self.shape.sorts().items()
            return math.fsum(
                share * costs.forward_s(p, batch.whole, 0) for layer, share in shares for p in parts[layer]
            )

        known = {first: total(batches[first]) for first in dict.fromkeys(alike)}
        return tuple(known[first] for first in alike)

    def of_family(self, family: str) -> Setting:
        """With the family's own partition, unless one was asked for."""
        return self if self.partition != "auto" else replace(self, partition=families.default_partition(family))

    def batch(self, segments: int, documents: Documents = ()) -> Batch:
        """A micro-batch whose sequences are cut into so many segments, of equal cost unless asked otherwise.

        `documents`: of each sequence its documents' lengths (tokens), by whose cost it is cut.
        """
        if not documents and segments in self._batches:
            return self._batches[segments]
        rows = tuple(map(tuple, documents))
        lengths = self.segment_lengths(segments, Batch(self.microbatch_size, (self.sequence_length,), rows).documents)
        self._check(lengths)
        found = Batch(self.microbatch_size, lengths, rows)
        return found if documents else self._batches.setdefault(segments, found)

    @cached_property
    def _batches(self) -> dict[int, Batch]:
        """Those of sequences of one document, by segments."""
        return {}

    def _check(self, lengths: tuple[int, ...]) -> None:
        """Whether the mesh divides this model and such segments."""
        self.mesh.check(self.shape, lengths)

    def segment_lengths(self, segments: int, documents: Documents = ()) -> tuple[int, ...]:
        refuse_bidirectional(self.shape, segments)
        if segments == 1:
            return (self.sequence_length,)
        if self.partition == "even":
            if self.evenness:
                raise ConfigError(
                    f"schedule.evenness: {self.evenness:g} moves cuts of equal computation, and these are even; leave it at 0"
                )
            return even(self.sequence_length, segments, self.segment_multiple)
        if self.profile is not None:
            seconds = partial(self._segment_s, documents)
            return from_costs(self.sequence_length, segments, seconds, self.segment_multiple, self.evenness)
        return for_shape(
            self.shape, self.sequence_length, segments, self.segment_multiple, self.keeping.recompute, self.evenness, documents
        )  # fmt: skip

    def _segment_s(self, documents: Documents, length: int, context: int) -> float:
        """Measured seconds of a layer, forward and backward, on `length` tokens behind `context` others; the mean of all."""
        segment, after = int(context > 0), self.sequence_length - context - length if documents else 0
        lengths = tuple(tokens for tokens in (context, length, after) if tokens)
        batch = Batch(self.microbatch_size, lengths, tuple(map(tuple, documents)))
        costs, total = self.profile or self.costs, 0.0
        for layer, share in self.shape.sorts().items():
            for part in layer_parts(layer):
                total += share * costs.forward_s(part, batch, segment) * (2 if self.keeping.runs_again(part) else 1)
                total += share * (costs.input_s(part, batch, segment) + costs.weight_s(part, batch, segment))
        return total

    def build(self, family: str, ranks: int, microbatches: int, **options: Any) -> Schedule:
        """The family's schedule, balanced by this setting's costs unless options say otherwise; checked."""
        known = self.known(family, options.get("vocabulary", "last"))
        return families.build_schedule(
            family, ranks=ranks, model=self.shape, microbatches=microbatches, **(known | options)
        )

    def known(self, family: str, vocabulary: str = "last", batches: Sequence[Batch] = ()) -> dict[str, Any]:
        """What a family balances by, and builds orders from; of these micro-batches, where each has its own.

        Embedding and head that all ranks share weigh nothing at the ends.
        """
        found = {key: value for key, value in self.balance.items() if key in families.options(family)}
        if vocabulary == "spread":
            found.pop("ends", None)
        built = {
            "prices": partial(building.prices, self, self.balancing, tuple(batches)),
            "kept": partial(building.kept_bytes, self),
            "layer_costs": self.layer_costs,
        }
        return found | built

    @cached_property
    def microbatch_s(self) -> float:
        """Seconds of one whole micro-batch, forward and backward, on one rank: nothing recomputed, nothing sent."""
        return self.batch_s(self.whole)

    def batch_s(self, batch: Batch) -> float:
        """The same of a micro-batch with documents of its own."""
        names = ("forward_s", "input_s", "weight_s")
        parts = self.shape.chain()
        one = {self.shape.alike(part): part for part in parts}
        priced = {
            like: math.fsum(getattr(self.costs, name)(part, batch.whole, 0) for name in names)
            for like, part in one.items()
        }
        return math.fsum(priced[self.shape.alike(part)] for part in parts)


@dataclass(frozen=True)
class Estimate:
    """A schedule priced."""

    setting: Setting
    schedule: Schedule
    program: Program
    seconds: Callable[[Action], float]
    message_seconds: Callable[[Message], float]
    timeline: Timeline

    @property
    def ideal_s(self) -> float:
        """The step if ranks shared the work evenly, never waited and recomputed nothing."""
        alike, batches = self.program.alike, self.program.batches
        each = {first: self.setting.batch_s(batches[first]) for first in dict.fromkeys(alike)}
        return math.fsum(each[first] for first in alike) / len(self.schedule.ranks)

    @property
    def reduction_s(self) -> float:
        """Summing gradients over all that hold the same parameters, after the last action: a ring's all-reduces.

        Data- and context-parallel replicas do; tensor-parallel ranks too, of what they do not divide. Replicas that
        divide the optimizer then send all others what they updated.
        """
        return reduction_s(self.schedule, self.setting)

    @property
    def step_s(self) -> float:
        """The pipeline's makespan, or what of its weight gradients comes home later, and the reduction behind it."""
        return max(self.timeline.makespan_s, self.timeline.settled_s) + self.reduction_s

    @property
    def tokens_per_s(self) -> float:
        """Of all data-parallel pipelines together."""
        setting = self.setting
        tokens = setting.sequence_length * setting.microbatch_size * self.schedule.microbatches
        return setting.data_parallel * tokens / self.step_s

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank: a plan fits when this does."""
        return max(self.timeline.peak_bytes)


def reduction_s(schedule: Schedule, setting: Setting) -> float:
    """See `Estimate.reduction_s`: of the rank that takes longest. It follows from the placement alone."""
    wholes, _ = owned_and_visiting(schedule, setting.shape)
    shares, _ = owned_and_visiting(schedule, setting.share)
    return reduction_of(wholes, shares, setting)


def reduction_of(wholes: Sequence[Elements], shares: Sequence[Elements], setting: Setting) -> float:
    """The same of what each rank owns of the model, and of what one accelerator of it holds of that."""
    replicas, wide = setting.data_parallel * setting.context_parallel, setting.keeping.wide_bytes
    if setting.links is None:
        among, between = setting.link, setting.link if replicas > 1 else setting.tensor_link
    else:
        among, between = setting.links.replicas, setting.links.copies
    slowest = 0.0
    for whole, held in zip(wholes, shares, strict=True):
        share = trained(held, setting.share)
        divided = sum(size for name, size in share.items() if size < whole[name])
        undivided = sum(share.values()) - divided
        sums_s = _all_reduce_s(divided * wide, replicas, among)
        sums_s += _all_reduce_s(undivided * wide, replicas * setting.tensor_parallel, between)
        updates = dealt(share, replicas) if setting.optimizer == "sharded" and replicas > 1 else []
        sums_s += math.fsum(among.seconds(size * wide) for size in updates if size)
        slowest = max(slowest, sums_s)
    return slowest


def estimate(schedule: Schedule, setting: Setting, batches: Batch | Sequence[Batch] | None = None) -> Estimate:
    """Price a schedule; `batches`: of each micro-batch its own (`Setting.batch`), and None is the same for all.

    Raises ConfigError where it does not suit the setting, ScheduleError where it cannot run.
    """
    check(schedule)
    return priced(lower(schedule, setting.shape, batches or setting.batch(schedule.segments)), setting)


def estimate_family(setting: Setting, family: str, ranks: int, microbatches: int, **options: Any) -> Estimate:
    """Build, lower as training does, and price."""
    setting = setting.of_family(family)
    schedule = setting.build(family, ranks, microbatches, **options)
    return priced(lower(schedule, setting.shape, setting.batch(schedule.segments)), setting)


def priced(program: Program, setting: Setting) -> Estimate:
    """A program under a setting: that of its schedule and batches."""
    keeping, schedule = setting.keeping, program.schedule
    seconds = action_seconds(schedule, setting.shape, program.batches, setting.costs, keeping)
    sizes = accelerator_bytes(program, keeping, setting.share, setting.group)
    travels = [
        setting.link_between(m.src, m.dst).seconds(size) for m, size in zip(program.messages, sizes, strict=True)
    ]

    def travel(message: Message) -> float:
        return travels[message.number]

    def host(message: Message) -> float:
        return sizes[message.number] * setting.link.host_s_per_byte

    timeline = simulate_program(
        program,
        seconds,
        travel,
        lambda message: sizes[message.number],
        keeping,
        setting.share,
        setting.link.communicators,
        host if setting.link.host_s_per_byte else None,
    )
    timeline = per_accelerator(timeline, setting.group)
    shards = setting.data_parallel * setting.context_parallel if setting.optimizer == "sharded" else 1
    standing = standing_bytes(schedule, setting.share, keeping, shards)
    return Estimate(setting, schedule, program, seconds, travel, replace(timeline, standing=standing))


def _all_reduce_s(nbytes: float, ranks: int, link: Link | None) -> float:
    """Around a ring; None is free."""
    return 2 * (ranks - 1) * link.seconds(nbytes / ranks) if link and ranks > 1 and nbytes else 0.0


def per_accelerator(timeline: Timeline, group: int) -> Timeline:
    """Of the activations of all accelerators of a rank, each holds as much."""
    if group == 1:
        return timeline
    memory = tuple(
        tuple(MemoryPoint(t, a // group, b, w // group) for t, a, b, w in points) for points in timeline.memory
    )
    return replace(timeline, memory=memory)


def simulate(
    schedule: Schedule,
    model: Shaped | ModelShape | str,
    hardware: Accelerator | str = "ideal",
    sequence_length: int = 4096,
    link: Link | str = "free",
    recompute: str = "selective",
    **more: Any,
) -> Timeline:
    """The predicted timeline of one step: seconds, and bytes of every rank. `more`: fields of `Setting`.

    Raises ConfigError for a model, accelerator or link that is not known, ScheduleError for a schedule that cannot run.
    """
    shape = model_shape(model) if isinstance(model, str) else shape_of(model)
    accelerator = named_accelerator(hardware) if isinstance(hardware, str) else hardware
    joined = named_link(link) if isinstance(link, str) else link
    keeping = more.pop("keeping", Keeping(recompute, 2, device=accelerator.device))
    return estimate(schedule, Setting(shape, sequence_length, accelerator, joined, keeping, **more)).timeline
