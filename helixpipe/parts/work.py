"""Work: what a part has to do and how what it leaves is kept: a model's shape, a batch, a segment, a keeping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from helixpipe.errors import ConfigError
from helixpipe.parts.kind import Kept, is_wide
from helixpipe.parts.part import Part, Value
from helixpipe.parts.window import pairs, seen, tail

if TYPE_CHECKING:
    from helixpipe.parts.kind import Kind
    from helixpipe.parts.shape import ModelShape


Lengths = tuple[tuple[int, ...], ...]
"""Of each sequence those of its documents, in tokens; none: each sequence is one document."""


@dataclass(frozen=True)
class Batch:
    """What one micro-batch looks like: `microbatch_size` sequences, cut into segments of these lengths (tokens).

    Raises ConfigError for documents that do not cover its sequences.
    """

    microbatch_size: int
    segment_lengths: tuple[int, ...]
    documents: Lengths = ()
    """Of each sequence the lengths of its documents (tokens), in order; none: a sequence is one document."""

    def __post_init__(self) -> None:
        if self.documents and len(self.documents) != self.microbatch_size:
            raise ConfigError(
                f"documents: of {len(self.documents)} sequences, and a micro-batch has {self.microbatch_size}; give those of each"
            )
        for lengths in self.documents:
            if sum(lengths) != self.sequence_length or min(lengths) < 1:
                raise ConfigError(
                    f"documents: their lengths add up to {sum(lengths)} and a sequence has {self.sequence_length} tokens; "
                    "give the lengths of all its documents, none 0"
                )

    @property
    def whole(self) -> Batch:
        """The same sequences and documents, not cut."""
        return replace(self, segment_lengths=(self.sequence_length,))

    @property
    def sequence_length(self) -> int:
        return sum(self.segment_lengths)

    def start(self, segment: int) -> int:
        """The segment's first position in the sequence."""
        return sum(self.segment_lengths[:segment])

    def tokens(self, segment: int) -> int:
        return self.microbatch_size * self.segment_lengths[segment]

    def runs(self, segment: int) -> Iterator[tuple[int, int, int]]:
        """Runs of one document in a segment, of all sequences: first and stop in their document, and its length."""
        start = self.start(segment)
        stop = start + self.segment_lengths[segment]
        for lengths in self.documents or ((self.sequence_length,),) * self.microbatch_size:
            begin = 0
            for length in lengths:
                if begin >= stop:
                    break
                if begin + length > start:
                    yield max(start - begin, 0), min(stop - begin, length), length
                begin += length

    def pairs(self, segment: int, causal: bool, window: int = 0) -> float:
        """(query, key) that the queries of a segment see, of all sequences. Causal without a window: the half."""
        start = self.start(segment)
        stop = start + self.segment_lengths[segment]
        if not self.documents:
            return self.microbatch_size * _pairs(start, stop, self.sequence_length, causal, window)
        return sum(_pairs(first, last, length, causal, window) for first, last, length in self.runs(segment))

    def seen(self, segment: int, window: int = 0) -> range:
        """Earlier segments of which some token of a segment sees some key."""
        of_window = seen(self.segment_lengths, segment, window)
        if not self.documents:
            return of_window
        start = self.start(segment)
        begin = min(_document_at(lengths, start) for lengths in self.documents)
        return range(min(max(of_window.start, self._segment_at(begin)), segment), segment)

    def tail(self, segment: int, window: int = 0) -> int:
        """Of a segment's tokens, how many at its end later segments see: of the sequence of which they see most."""
        length = self.segment_lengths[segment]
        of_window = tail(length, window)
        if not self.documents:
            return of_window
        stop = self.start(segment) + length
        return min(of_window, max(stop - _document_at(lengths, stop) for lengths in self.documents))

    def _segment_at(self, position: int) -> int:
        """The segment that has a position."""
        ends = itertools.accumulate(self.segment_lengths)
        return next(segment for segment, end in enumerate(ends) if position < end)


def microbatches(
    whole: Batch,
    count: int,
    documents: Sequence[tuple[int, ...]],
    cut: Callable[[Lengths], tuple[int, ...]],
) -> list[Batch]:
    """So many micro-batches of sequences that follow one another: each with its documents and cut by them.

    `documents`: of each sequence the lengths of its documents, or none at all. A micro-batch whose sequences are one document
    each is `whole`. `cut`: a micro-batch's documents -> tokens of each segment.
    """
    size = whole.microbatch_size
    rows = [tuple(documents[number * size : (number + 1) * size]) for number in range(count)]
    return [
        replace(whole, segment_lengths=cut(mine), documents=mine) if any(len(row) > 1 for row in mine) else whole
        for mine in rows
    ]


def first_alike(batches: Sequence[Batch]) -> tuple[int, ...]:
    """Of each micro-batch the first one that equals it: what is asked of that one holds of both."""
    known: dict[Batch, int] = {}
    return tuple(known.setdefault(batch, number) for number, batch in enumerate(batches))


def _pairs(start: int, stop: int, length: int, causal: bool, window: int) -> float:
    if window:
        return pairs(start, stop, length, causal, window)
    return (stop**2 - start**2) / 2 if causal else float((stop - start) * length)


def _document_at(lengths: tuple[int, ...], position: int) -> int:
    """Where the document begins that goes on at a position; the position itself where one begins there, or nothing does."""
    begin = 0
    for length in lengths:
        if begin + length > position:
            return begin
        begin += length
    return position


@dataclass(frozen=True)
class Keeping:
    """How a run keeps activations: policy, precision, chunked parts."""

    recompute: str = "selective"
    """`none`, `full` or `selective`: see `runtime.tape`."""
    element_bytes: int = 4
    mlp_chunk: int = 0
    head_chunk: int = 0
    device: str = "cpu"
    """`cpu` or `cuda`: whose kernels decide what a part needs while it runs."""

    keeps_activated: bool = False
    """Whether an MLP keeps its activated tensor too, as plain autograd does: 16 and not 12. For others' runs."""
    tensor_parallel: int = 1
    """Ranks that divide the matrices. Bytes are those of all of them together."""
    threads: int = 1
    """CPU threads of a process: each has a tile of attention's scores."""
    processes: int = 1
    """That are one rank together, tp x cp."""

    @property
    def wide_bytes(self) -> int:
        """An element in float32, or wider when the run is."""
        return max(4, self.element_bytes)

    @property
    def recomputes(self) -> bool:
        return self.recompute != "none"

    @property
    def is_lean(self) -> bool:
        """Whether recomputed graphs make cheap values again and let gradients take the places of values."""
        return self.recomputes and not self.keeps_activated

    def runs_again(self, part: Part) -> bool:
        """Whether the policy recomputes a part."""
        if part.about.graphed:
            return False
        return self.recompute == "full" or (self.recompute == "selective" and not part.about.attends)


@dataclass(frozen=True)
class Work:
    """One segment of a micro-batch of a model. Bytes are those of all accelerators of a rank together."""

    shape: ModelShape
    batch: Batch
    segment: int = 0
    keeping: Keeping = field(default_factory=Keeping)

    @property
    def length(self) -> int:
        """Tokens of each sequence in the segment."""
        return self.batch.segment_lengths[self.segment]

    @property
    def lead(self) -> tuple[int, int]:
        """b and s: every value's first two sizes."""
        return self.batch.microbatch_size, self.length

    @property
    def tokens(self) -> int:
        return self.batch.tokens(self.segment)

    def slices(self, part: Part) -> bool:
        """Whether a part runs in slices: where the segment is longer than the part's chunk (see `model.chunked`)."""
        return 0 < self.shape.about(part).chunk(self.keeping) < self.length

    def value_bytes(self, value: Value) -> int:
        if value not in self._value_bytes:
            elements = math.prod(self.shape.value_shape(value, self.batch, self.segment))
            each = self.keeping.wide_bytes if is_wide(value.name) else self.keeping.element_bytes
            self._value_bytes[value] = elements * each
        return self._value_bytes[value]

    @cached_property
    def _value_bytes(self) -> dict[Value, int]:
        return {}

    def values(self, values: Iterable[Value]) -> Kept:
        """Bytes of these, by name."""
        return {str(value): self.value_bytes(value) for value in values}

    @property
    def unit(self) -> int:
        """Bytes of one element of every token."""
        return self.tokens * self.keeping.element_bytes

    @property
    def wide_unit(self) -> int:
        """The same in float32, or wider when the run is."""
        return self.tokens * self.keeping.wide_bytes

    @property
    def is_wide(self) -> bool:
        """Whether the run computes in float32 or wider, so that nothing is widened."""
        return self.keeping.element_bytes == self.keeping.wide_bytes

    def sliced(self, part: Part) -> Work:
        """One slice of a part that runs in slices: as many tokens as its chunk, of a segment by itself."""
        tokens = self.shape.about(part).chunk(self.keeping)
        whole = replace(self.keeping, mlp_chunk=0, head_chunk=0)
        return replace(self, batch=Batch(self.batch.microbatch_size, (tokens,)), segment=0, keeping=whole)

    def gathered(self, value: Value) -> str:
        """The name of a value that tensor-parallel ranks gather: another tensor than their shares of it."""
        return f"{value} gathered" if self.keeping.tensor_parallel > 1 else str(value)

    def saved(self, part: Part) -> Kept:
        """What autograd saves of a part."""
        if part not in self._saved:
            self._saved[part] = self.shape.about(part).saved(part, self)
        return self._saved[part]

    @cached_property
    def _saved(self) -> dict[Part, Kept]:
        return {}

    def kept(self, part: Part) -> Kept:
        """What a selective recompute keeps of a part beside its chunk's inputs."""
        return self.shape.about(part).kept(part, self)

    def put_off(self, part: Part) -> Kept:
        """What an I leaves of a part for its W."""
        return self.shape.about(part).put_off(part, self)

    def forward_workspace(self, part: Part, graph: bool) -> int:
        """Bytes beside inputs, outputs and what is saved, at most, while a part's forward runs."""
        about = self.shape.about(part)
        return about.forward_workspace(part, self, graph) + (0 if graph else self._narrow(about, part))

    def in_place(self, part: Part) -> int:
        """Bytes of gradients that need no room of their own where nobody else reads what they are of."""
        return self.shape.about(part).in_place(part, self)

    def backward_workspace(self, part: Part, unread: bool) -> int:
        """Bytes beside what is saved and the gradients of its outputs, at most, while a part's backward runs."""
        about = self.shape.about(part)
        return about.backward_workspace(part, self, unread) + self._narrow(about, part)

    def _narrow(self, about: Kind, part: Part) -> int:
        """Bytes of what one adapter makes between its matrices, or of its gradient."""
        if self.shape.lora is None or about.opaque:  # whose parts say it
            return 0
        return max(about.narrow(part, self.sliced(part) if self.slices(part) else self).values(), default=0)
