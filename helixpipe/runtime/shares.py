"""Shares: which tokens of a batch a rank works on. Callers hand over whole sequences, the same to every rank.

    rows        dp 0: 0 1 | 2 3     dp 1: 4 5 | 6 7          sequences, in micro-batches
    tokens      cp 0: 0 1 6 7       cp 1: 2 3 4 5            of every segment, in the layout
    of those    tp 0: 0 1           tp 1: 6 7                embedding, norms and head; attention and matrices see all

Targets and their weights are cut with their tokens, and losses divided by the whole batch's count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.parts.work import Batch, Lengths, microbatches
from helixpipe.runtime.context import Context
from helixpipe.runtime.documents import positions
from helixpipe.runtime.mesh import Mesh
from helixpipe.runtime.programs import Recent
from helixpipe.runtime.tape import Feed
from helixpipe.schedule.partition import Cut

# ways to cut a sequence of which it is remembered where their tokens are
MOST_CUTS = 64


class Shares:
    """Of one rank. `cut`: tokens of a sequence and a micro-batch's documents -> tokens of each segment, whole."""

    def __init__(
        self,
        mesh: Mesh,
        context: Context | None,
        microbatches: int,
        cut: Cut,
        device: torch.device,
    ) -> None:
        self.mesh, self.context, self.microbatches, self.cut = mesh, context, microbatches, cut
        self.device = device
        self._starts: Recent[tuple[int, ...], list[tuple[int | Tensor, int | Tensor]]] = Recent(MOST_CUTS)

    def batch(self, tokens: Tensor, targets: Tensor) -> Batch:
        """What a micro-batch without documents is, whole: on all cp and tp ranks together. Raises ConfigError."""
        m, dp = self.microbatches, self.mesh.shape.dp
        if tokens.dim() != 2 or tokens.shape != targets.shape or not tokens.numel():
            raise ConfigError(
                f"tokens {list(tokens.shape)}, targets {list(targets.shape)}: give both as [sequences, tokens], none 0"
            )
        if tokens.shape[0] % (m * dp):
            over = f" on each of {dp} dp ranks" if dp > 1 else ""
            raise ConfigError(f"tokens: {tokens.shape[0]} sequences do not divide into {m} micro-batches{over}")
        lengths = self.cut(tokens.shape[1], ())
        if sum(lengths) != tokens.shape[1]:
            raise ConfigError(
                f"tokens: {tokens.shape[1]} a sequence, and the segments {list(lengths)} add up to {sum(lengths)}"
            )
        return Batch(tokens.shape[0] // (m * dp), lengths)

    def batches(self, whole: Batch, documents: Lengths) -> tuple[Batch, ...]:
        """Of each micro-batch of this replica what `batch` says, with its documents of the whole batch's, and cut by them."""
        first = self.mesh.here.dp * self.microbatches * whole.microbatch_size
        cut = partial(self.cut, whole.sequence_length)
        return tuple(microbatches(whole, self.microbatches, documents[first:], cut))

    def local(self, whole: Batch) -> Batch:
        """The tokens that this rank's attention asks for; where documents begin is said of whole sequences alone."""
        if self.mesh.shape.cp == 1:
            return whole
        lengths = tuple(n // self.mesh.shape.cp for n in whole.segment_lengths)
        return replace(whole, segment_lengths=lengths, documents=())

    def feeds(
        self, tokens: Tensor, targets: Tensor, batches: Sequence[Batch], weights: Tensor | None = None
    ) -> dict[tuple[int, int], Feed]:
        """By micro-batch and segment."""
        size = batches[0].microbatch_size
        first = self.mesh.here.dp * self.microbatches * size
        given = (tokens, targets) if weights is None else (tokens, targets, weights)
        mine = [self._here(t[first : first + self.microbatches * size]) for t in given]
        found = {}
        for mb, batch in enumerate(batches):
            rows = slice(mb * size, (mb + 1) * size)
            packed = positions(batch, self.device) if batch.documents else None
            for seg, (start, gathered) in enumerate(self._starts_of(batch)):
                length = batch.segment_lengths[seg] // self.mesh.shape.cp
                here = _tokens(start, length // self.mesh.shape.tp)
                ours, theirs, *weighing = (t[rows, here] for t in mine)
                feed = Feed(
                    ours, theirs, start, seg, gathered_start=gathered, sequence_length=batch.sequence_length,
                    weights=weighing[0] if weighing else None,
                )  # fmt: skip
                if packed is not None:
                    attended = packed.of(_tokens(gathered, length))
                    feed = replace(feed, start=packed.of(here), gathered_start=attended, batch=batch)
                found[mb, seg] = feed
        return found

    def _here(self, given: Tensor) -> Tensor:
        """On the device. A copy from pinned memory is queued there like a kernel, and the CPU goes on."""
        if self.device.type != "cuda" or given.device.type != "cpu":
            return given.to(self.device)
        return given.pin_memory().to(self.device, non_blocking=True)

    def _starts_of(self, whole: Batch) -> list[tuple[int | Tensor, int | Tensor]]:
        segments = range(len(whole.segment_lengths))
        return self._starts.get(whole.segment_lengths, lambda: [self._places(whole, seg) for seg in segments])

    def _places(self, whole: Batch, segment: int) -> tuple[int | Tensor, int | Tensor]:
        """Where this rank's tokens are, and where those that its q, k and v are of."""
        first, length, tp = whole.start(segment), whole.segment_lengths[segment], self.mesh.shape.tp
        if self.context is None:
            return first + self.mesh.here.tp * (length // tp), first
        gathered = (first + self.context.positions(length)).to(self.device)
        return (gathered.chunk(tp)[self.mesh.here.tp] if tp > 1 else gathered), gathered


def _tokens(start: int | Tensor, length: int) -> slice | Tensor:
    """Which of a sequence's tokens stand at `start`."""
    return start if isinstance(start, Tensor) else slice(start, start + length)
