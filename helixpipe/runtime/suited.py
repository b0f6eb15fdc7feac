"""Suited: whether a model, a schedule and a batch can be run together; what cannot is refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from helixpipe.errors import ConfigError
from helixpipe.model.attn import Attention
from helixpipe.model.decoder import Model
from helixpipe.parts.part import Part, vocabulary_shards
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Lengths
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.vocabulary import check_words


def check_segments(model: Model, schedule: Schedule, lengths: tuple[int, ...] | None) -> None:
    """A sequence can be cut only where what comes later does not matter, and where its state is known."""
    if schedule.segments == 1:
        return
    if lengths is not None and (len(lengths) != schedule.segments or min(lengths) < 1):
        raise ConfigError(
            f"segment_lengths: {lengths}; the schedule has {schedule.segments} segments: give as many lengths, none 0"
        )
    if not model.shape.causal:
        raise ConfigError(
            "model.causal: false; a segment of bidirectional attention needs the segments after it: use helix, or one segment"
        )
    block = next((part for stage in schedule.stages for part in stage.parts if part.about.opaque), None)
    if block is not None:
        raise ConfigError(
            f"schedule.segments: {block} is opaque, so what it carries from segment to segment is not known"
        )


def check_vocabulary(model: Model, schedule: Schedule) -> None:
    """A vocabulary can be spread where head and embedding are ours: someone's own would be left out, and nobody would notice."""
    shards = vocabulary_shards(schedule.parts)
    if not shards:
        return
    kind = type(model)
    ours = kind.part.__module__.startswith("helixpipe.") and type(model.shape).about is ModelShape.about
    if not getattr(model, "spreads_vocabulary", ours):
        raise ConfigError(
            f"schedule.vocabulary: spread, and {kind.__name__} hands out parts of its own, of which head and embedding would be left "
            "out; use last, or set spreads_vocabulary to true in a model that knows their shards"
        )
    check_words(shards, model.shape.vocabulary)


def check_attention(modules: Mapping[Part, nn.Module], segments: int) -> None:
    """Another's attention would see no more than its own segment, and nobody would notice."""
    for part, module in modules.items():
        if segments > 1 and part.about.attends and not isinstance(module, Attention):
            raise ConfigError(
                f"schedule.segments: {part} is {type(module).__name__}, which is not handed the keys and values of earlier "
                "segments; use helixpipe.Attention, or segments = 1"
            )


def check_positions(model: Model, batch: Batch, documents: Lengths) -> None:
    shape, length = model.shape, max((max(lengths) for lengths in documents), default=batch.sequence_length)
    if shape.positions == "learned" and length > shape.context:
        raise ConfigError(
            f"tokens: {length} a {'document' if documents else 'sequence'}, and learned positions have room for {shape.context}; "
            "shorten them or raise model.context"
        )
