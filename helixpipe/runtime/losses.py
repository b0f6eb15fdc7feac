"""Losses of an evaluation: sums over targets that count, in all and by position in the sequence.

    position   0 | 1 | 2 3 | 4 5 6 7 | 8 ...      bucket 0 is position 0, bucket i the positions 2^(i-1) to 2^i - 1

They are sums, so that evaluations of any batches and layouts add up to the same: a mean of means would not. Where targets have
weights, a sum is that of weight times loss, and what it is divided by may be more than the targets: `Counted`.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from helixpipe.errors import ConfigError, UncountedWarning
from helixpipe.model.head import counted as count
from helixpipe.model.rope import Positions, Start
from helixpipe.parts.head import IGNORED
from helixpipe.parts.part import Part
from helixpipe.parts.work import Batch, Lengths
from helixpipe.runtime.documents import positions

Counted = int | Tensor | None
"""What a loss is divided by: a number, as many as a mask [b, s] has true, or as many targets as count."""


class Bucket(NamedTuple):
    """Of the targets at positions `first` to `stop` - 1."""

    first: int
    stop: int
    total: float
    """Nats."""
    counted: int

    @property
    def mean(self) -> float:
        """Nats a target; NaN where none counts."""
        return self.total / self.counted if self.counted else math.nan


@dataclass(frozen=True)
class Losses:
    """Of some sequences."""

    total: float
    """Nats, over all targets that count."""
    counted: int
    by_position: tuple[Bucket, ...] = ()
    """By powers of two, up to the longest document or sequence of one; empty where `without` says why."""
    without: str = ""
    """Why losses by position are not known."""

    @property
    def mean(self) -> float:
        """Nats a target; NaN where none counts."""
        return self.total / self.counted if self.counted else math.nan

    @staticmethod
    def joined(each: Sequence[Losses]) -> Losses:
        """Of all their sequences together; totals are rounded once."""
        without = next((one.without for one in each if one.without), "")
        rows = zip_longest(*(one.by_position for one in each))
        buckets = [] if without else [[bucket for bucket in row if bucket is not None] for row in rows]
        return Losses(
            math.fsum(one.total for one in each),
            sum(one.counted for one in each),
            tuple(
                Bucket(
                    row[0].first, max(b.stop for b in row), math.fsum(b.total for b in row), sum(b.counted for b in row)
                )
                for row in buckets
            ),
            without,
        )


def buckets(length: int) -> list[tuple[int, int]]:
    """First position and end of each bucket of a sequence."""
    firsts = [0, *(2**i for i in range((length - 1).bit_length()))]
    return list(zip(firsts, [*firsts[1:], length], strict=True))


def bucketed(values: Tensor, start: Start, length: int) -> Tensor:
    """Sums by bucket of [b, s], which stand at `start` in sequences of `length`: float64 [buckets], in one order always."""
    firsts = torch.tensor([first for first, _ in buckets(length)], device=values.device)
    if isinstance(start, Positions):
        which, wide = torch.bucketize(start.at.contiguous(), firsts, right=True) - 1, values.double()
        return torch.stack([torch.where(which == i, wide, wide.new_zeros(())).sum() for i in range(len(firsts))])
    positions = (
        start if isinstance(start, Tensor) else torch.arange(start, start + values.shape[1], device=values.device)
    )
    inside = torch.bucketize(positions, firsts, right=True) - 1 == torch.arange(
        len(firsts), device=values.device
    ).unsqueeze(1)
    sums = values.double().sum(0)
    return torch.where(inside, sums, sums.new_zeros(())).sum(1)


def of_rank(losses: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
    """What a rank tells of its micro-batches and segments: whether one is a sum alone, and sums by bucket; on their device."""
    sums = torch.zeros(1 + len(buckets(length)), dtype=torch.float64, device=device)
    for each in losses:
        sums[1:] += each
    sums[0] = any(not each.dim() for each in losses)
    return sums


def of_ranks(
    told: Sequence[tuple[float, list[float]]],
    targets: Tensor,
    head: Part,
    counted: Counted = None,
    documents: Lengths = (),
) -> Losses:
    """The losses of a batch, from each rank's loss and what `of_rank` says; `targets` and `documents` are the whole batch's."""
    total, whole = math.fsum(loss for loss, _ in told), _number(targets, counted)
    if any(is_sum for _, (is_sum, *_) in told):
        return Losses(total, whole, (), f"{head} gives one sum; let its module have token_losses(x, targets) -> [b, s]")
    if counted is not None and not (isinstance(counted, Tensor) and counted.dim()):
        return Losses(total, whole, (), "counted is a number; give a mask [b, s] of what counts")
    mask = targets != IGNORED if counted is None else counted
    sums = zip(*(each for _, (_, *each) in told), strict=True)
    length, at = targets.shape[1], None
    if documents:
        length = max(max(lengths) for lengths in documents)
        at = positions(Batch(len(targets), (targets.shape[1],), documents), targets.device).at
    found = [
        Bucket(first, stop, math.fsum(each), int(_between(mask, at, first, stop).sum()))
        for (first, stop), each in zip(buckets(length), sums, strict=not documents)  # further ones are of nothing
    ]
    return Losses(total, whole, tuple(found))


def _between(mask: Tensor, at: Tensor | None, first: int, stop: int) -> Tensor:
    """Those at positions `first` to `stop` - 1, of their documents where `at` has these."""
    return mask[:, first:stop] if at is None else mask[(at >= first) & (at < stop)]


def check_weights(weights: Tensor | None, targets: Tensor) -> None:
    """Raise ConfigError for weights that cannot be."""
    if weights is None:
        return
    if weights.shape != targets.shape or not weights.is_floating_point():
        raise ConfigError(
            f"weights: {str(weights.dtype).removeprefix('torch.')} {list(weights.shape)}, and targets are "
            f"{list(targets.shape)}; give as many, as float32"
        )
    if not weights.isfinite().all():
        raise ConfigError("weights: some are no finite numbers; give 0 to a target that is to weigh nothing")


def check_head(takes: bool, head: Part) -> None:
    """Raise ConfigError where the head's module, on whichever rank it is, cannot be told of weights."""
    if not takes:
        raise ConfigError(
            f"weights: the module of {head} takes targets alone; let its forward be (x, targets, weights=None), and give the sum "
            "of each loss times its weight"
        )


def divisor(targets: Tensor, counted: Counted) -> int:
    """What a loss summed over targets is divided by: how many count, of the batch or of all that was told."""
    here, whole = count(targets), _number(targets, counted)
    if whole < here:
        raise ConfigError(
            f"counted: {whole}, and {here} targets of this batch alone count; give the number of all steps of the update together"
        )
    if not whole:
        warnings.warn(
            f"none of the {targets.numel()} targets counts, all are -100: the loss of this batch is 0 and gradients get nothing",
            UncountedWarning,
            stacklevel=3,  # whoever called `step` or `evaluate`
        )
    return max(whole, 1)


def _number(targets: Tensor, counted: Counted) -> int:
    if counted is None:
        return count(targets)
    if not isinstance(counted, Tensor) or not counted.dim():
        return operator.index(counted)
    if counted.shape != targets.shape or counted.dtype is not torch.bool:
        raise ConfigError(
            f"counted: {str(counted.dtype).removeprefix('torch.')} {list(counted.shape)}, and targets are "
            f"{list(targets.shape)}; give as many, as bool, or a number"
        )
    return int(counted.sum())
