"""Layouts: how the sources of a config are cut into rows, and the reading of a run over them.

What reads no token is for whoever predicts: `open_reading` says the documents of every step from lengths alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helixpipe.config_data import DataConfig
from helixpipe.errors import DataError
from helixpipe.parts.shape import ModelShape
from helixpipe.train.balance import LengthWork
from helixpipe.train.packing import Packs
from helixpipe.train.pieces import Tokens
from helixpipe.train.reading import Reading
from helixpipe.train.rows import Layout
from helixpipe.train.source import Source, check_mixture, open_source
from helixpipe.train.windows import Windows


def open_sources(data: DataConfig, vocabulary: int) -> tuple[Source, ...]:
    """The sources of a run, of one vocabulary; raises DataError."""
    by_documents = data.packing != "windows" or data.masks_documents
    sources = tuple(open_source(each.path, data, vocabulary, by_documents) for each in data.sources)
    check_mixture(sources)
    return sources


def open_reading(
    data: DataConfig,
    shape: ModelShape,
    sequence_length: int,
    *,
    microbatches: int,
    microbatch_size: int = 1,
    replicas: int = 1,
    seed: int = 0,
) -> Reading:
    """What a run with this data would read: `documents(step)`, from 1 on, are those of each row. Raises DataError.

    `microbatches`: of each of `replicas`. Of prepared folders no token is read.
    """
    sources = open_sources(data, shape.vocabulary)
    return reading_of(
        sources, data, shape, sequence_length,
        microbatches=microbatches, microbatch_size=microbatch_size, replicas=replicas, seed=seed,
    )  # fmt: skip


def reading_of(
    sources: tuple[Source, ...],
    data: DataConfig,
    shape: ModelShape,
    sequence_length: int,
    *,
    microbatches: int,
    microbatch_size: int,
    replicas: int,
    seed: int,
) -> Reading:
    """As `open_reading`, of sources that are open."""
    layouts = []
    for source in sources:
        layouts.append(_layout(data, sequence_length, source.training, source.training_ends, seed))
        if not len(layouts[-1]):
            raise DataError(_nothing_to_train_on(source, layouts[-1], sequence_length))
    return Reading(
        tuple(layouts),
        tuple(each.weight for each in data.sources),
        sequence_length,
        microbatches,
        microbatch_size,
        replicas,
        seed,
        data.look_ahead if data.packing == "balanced" else 0,
        LengthWork(shape) if data.masks_documents else None,
    )


def held_out_layout(source: Source, data: DataConfig, sequence_length: int) -> Layout:
    """The rows of what a source holds out, whatever the seed; raises DataError where there are none and should be some."""
    layout = _layout(data, sequence_length, source.held_out, source.held_out_ends, 0)
    if data.held_out and not len(layout):
        raise DataError(_nothing_held_out(source, layout, sequence_length))
    return layout


def _layout(data: DataConfig, length: int, tokens: Tokens, ends: NDArray[np.int64] | None, seed: int) -> Layout:
    if data.packing == "windows" or ends is None:
        return Windows(len(tokens), length, ends)
    return Packs(ends, length, data.longest, data.masks_documents, seed)


def _nothing_to_train_on(source: Source, layout: Layout, length: int) -> str:
    if isinstance(layout, Packs):
        return f"{source.named} has no document to train on: {_why_none(layout, length)}"
    return (
        f"{source.named} has {len(source.training)} tokens to train on, fewer than a sequence and its next token "
        f"({length + 1}); shorten train.sequence_length or give more data"
    )


def _nothing_held_out(source: Source, layout: Layout, length: int) -> str:
    if isinstance(layout, Packs):
        return f"{source.named} holds out no document to evaluate on: {_why_none(layout, length)}, or set data.held_out to 0"
    return (
        f"{source.named} leaves {len(source.held_out)} tokens held out, fewer than a sequence and its next token "
        f"({length + 1}); raise data.held_out, set it to 0, or give more data"
    )


def _why_none(layout: Packs, length: int) -> str:
    """Why documents make no row, and what to do."""
    if layout.dropped:
        return (
            f"{layout.dropped} of {layout.documents} are longer than a sequence of {length} and dropped; "
            "set data.longest to cut or lengthen train.sequence_length"
        )
    if layout.documents:
        return f"the {layout.documents} there are have no token that follows another; give longer documents"
    return "whole documents are held out, from the tail, and there are too few; give more, choose another data.held_out"
