"""Segment partition: into which lengths a sequence is cut.

Causal attention makes later tokens dearer: token t attends to t others. Segments of as many tokens therefore cost
more and more, and in a pipeline of segments all wait for the dearest. These functions give lengths, first segment
first, that sum to the sequence:

    even               as many tokens each
    computation_wise   as much computation each, from linear and quadratic cost, in closed form
    for_shape          the same, with the costs of a model's layers in FLOPs, each with its own window, and of documents
    as_training        that, where nobody says how to cut
    from_costs         the dearest segment as cheap as can be, under measured costs
    pipelined          TeraPipe's: t_1 + ... + t_k + (p-1) max t least, and k is found too

All but the last length are multiples of `multiple`, which kernels like, and none is shorter.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part, layer_parts
from helixpipe.parts.work import Batch, Keeping
from helixpipe.schedule.partition_documents import equal_work

if TYPE_CHECKING:
    from helixpipe.parts.shape import ModelShape

MULTIPLE = 128
BISECTIONS = 60
GRAIN = 1.01  # bounds closer than this are one
Documents = Sequence[Sequence[int]]
"""Of each row of a micro-batch the lengths of its documents (tokens); none: a row is one document."""
Cut = Callable[[int, Documents], tuple[int, ...]]
"""(tokens of a sequence, a micro-batch's documents) -> tokens of each segment."""
Seconds = Callable[[int, int], float]
"""(length, context) -> cost of a segment of `length` tokens behind `context` earlier ones.

A longer segment behind the same context must not cost less, nor a segment more than one that it is the end of.
"""


def even(length: int, segments: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """Segments of as many tokens each, as near as `multiple` allows."""
    return _rounded([length * i / segments for i in range(1, segments)], length, segments, multiple)


def computation_wise(
    length: int, segments: int, linear: float, quadratic: float, multiple: int = MULTIPLE, evenness: float = 0.0
) -> tuple[int, ...]:
    """Segments that cost the same, if one from `start` to `end` costs linear*(end-start) + quadratic*(end^2-start^2).

    Everything before boundary x costs linear*x + quadratic*x^2, so boundary i of k solves
    quadratic*x^2 + linear*x = i/k of the whole.

    Equal cost makes the first segments the longest, and these are what a rank keeps most of. `evenness` moves every
    boundary that share of its way to the even ones: 0.5 costs little time and saves half of that memory.
    """
    _check_evenness(evenness)
    if not (min(linear, quadratic) >= 0 < linear + quadratic < math.inf):
        raise ConfigError(
            f"schedule.partition: linear cost {linear:g} and quadratic cost {quadratic:g}; give two from 0 up, not both 0"
        )
    whole = linear * length + quadratic * length**2
    costs = [whole * i / segments for i in range(1, segments)]
    # the usual formula, written so that it holds without a quadratic part and does not subtract equals
    bounds = [2 * cost / (linear + math.sqrt(linear**2 + 4 * quadratic * cost)) for cost in costs]
    return _rounded(_moved(bounds, length, evenness), length, segments, multiple)


def for_shape(
    shape: ModelShape,
    length: int,
    segments: int,
    multiple: int = MULTIPLE,
    recompute: str = "none",
    evenness: float = 0.0,
    documents: Documents = (),
) -> tuple[int, ...]:
    """`computation_wise` for a model's layers: FLOPs of forward, backward and what `recompute` runs again.

    Embedding and head are left out: they are on one rank each, and the layers on all. `documents`: of each row of a
    micro-batch the lengths of its documents, which attend to themselves alone.
    """

    refuse_bidirectional(shape, segments)
    if any(len(lengths) > 1 for lengths in documents):
        _check_evenness(evenness)
        bounds = equal_work(documents, segments, *_of_tokens_and_pairs(shape, length, recompute))
        return _rounded(_moved(bounds, length, evenness), length, segments, multiple)
    if any(shape.windows):
        return _equal(length, segments, lambda tokens: _prefix_flops(shape, tokens, recompute), multiple, evenness)
    batch = Batch(1, (length,))
    linear = quadratic = 0.0
    for part in layer_parts(0):
        forward, backward = shape.forward_flops(part, batch, 0), shape.backward_flops(part, batch, 0)
        again = Keeping(recompute).runs_again(part)
        flops = forward + backward + (forward if again else 0.0)
        if part.about.attends:
            quadratic += flops / length**2
        else:
            linear += flops / length
    return computation_wise(length, segments, linear, quadratic, multiple, evenness)


def _of_tokens_and_pairs(shape: ModelShape, length: int, recompute: str) -> tuple[float, dict[int, float]]:
    """FLOPs of a layer, the mean of all: of a token, and by window of a pair of a token and a key that it sees."""
    batch, linear = Batch(1, (length,)), 0.0
    pairs: dict[int, float] = {}
    for layer, share in shape.sorts().items():
        window = shape.window_of(layer)
        for part in layer_parts(layer):
            flops = share * _flops(shape, part, batch, recompute)
            if part.about.attends:
                pairs[window] = pairs.get(window, 0.0) + flops / batch.pairs(0, True, window)
            else:
                linear += flops / length
    return linear, pairs


def _flops(shape: ModelShape, part: Part, batch: Batch, recompute: str) -> float:
    """Of a part's forward, what is run again of it, and its backward."""
    forward, backward = shape.forward_flops(part, batch, 0), shape.backward_flops(part, batch, 0)
    return backward + forward * (2 if Keeping(recompute).runs_again(part) else 1)


def _prefix_flops(shape: ModelShape, tokens: int, recompute: str) -> float:
    """Of a layer, the mean of all, on a sequence's first tokens."""
    batch, total = Batch(1, (tokens,)), 0.0
    for layer, share in shape.sorts().items():
        for part in layer_parts(layer):
            total += share * _flops(shape, part, batch, recompute)
    return total


def _equal(
    length: int, segments: int, before: Callable[[int], float], multiple: int, evenness: float
) -> tuple[int, ...]:
    """Segments that cost the same, where everything before a boundary costs `before(boundary)`."""
    _check_evenness(evenness)
    whole = before(length)
    bounds = [float(bisect.bisect_left(range(length), whole * i / segments, key=before)) for i in range(1, segments)]
    return _rounded(_moved(bounds, length, evenness), length, segments, multiple)


def as_training(
    shape: ModelShape, length: int, segments: int, recompute: str = "none", unit: int = 1, documents: Documents = ()
) -> tuple[int, ...]:
    """What training cuts where nothing else is asked for; shorter sequences in finer steps, all of them multiples of `unit`."""
    multiple = max(unit, min(MULTIPLE, length // segments) // unit * unit)
    return for_shape(shape, length, segments, multiple, recompute, 0.0, documents) if segments > 1 else (length,)


def from_costs(
    length: int, segments: int, seconds: Seconds, multiple: int = MULTIPLE, evenness: float = 0.0
) -> tuple[int, ...]:
    """The dearest segment as cheap as can be, under measured costs; `evenness` as in `computation_wise`.

    Bisects what the dearest may cost: under a bound, every segment takes all tokens that stay within it.
    """
    check_cut(length, segments, multiple)
    _check_evenness(evenness)
    best = even(length, segments, multiple)
    low, high = 0.0, max(_costs(best, seconds))
    for _ in range(BISECTIONS):
        bound = (low + high) / 2
        found = _longest(length, segments, seconds, multiple, bound)
        if found is None:
            low = bound
        else:
            best, high = found, max(_costs(found, seconds))
    return _rounded(_moved(list(itertools.accumulate(best[:-1])), length, evenness), length, segments, multiple)


def pipelined(
    length: int, ranks: int, seconds: Seconds, multiple: int = MULTIPLE, microbatches: int = 1
) -> tuple[int, ...]:
    """TeraPipe's partition (arXiv 2102.07988): m(t_1 + ... + t_k) + (p-1) max t least, and k comes with it.

    For each bound on the dearest segment, dynamic programming finds the least sum. Bounds are costs
    that occur, about a hundredth apart: the result is at most 1% of (p-1) max t above the least.
    """
    check_cut(length, 1, multiple)
    ends = [*range(multiple, length - multiple + 1, multiple), length]
    cost = [[seconds(end - start, start) for end in ends[i:]] for i, start in enumerate([0, *ends[:-1]])]
    best: tuple[int, ...] = (length,)
    least = math.inf
    lowest = _least_sum(ends, cost, math.inf)[1]  # no bound can have a lower sum
    for bound in _apart(sorted(each for row in cost for each in row), GRAIN):
        if microbatches * lowest + (ranks - 1) * bound / GRAIN >= least:
            break
        lengths, total = _least_sum(ends, cost, bound)
        value = microbatches * total + (ranks - 1) * max(_costs(lengths, seconds), default=math.inf)
        if value < least:
            best, least = lengths, value
    return best


def refuse_bidirectional(shape: ModelShape, segments: int) -> None:
    """Raise ConfigError where a model cannot be run in so many segments."""
    refuse_opaque(segments, shape.opaque)
    if segments > 1 and not shape.causal:
        raise ConfigError(
            f"schedule.segments: {segments} segments need causal attention (model.causal), since the first segments run "
            "before the keys of later ones exist; use segments = 1, or the helix family, which splits no sequence"
        )


def refuse_opaque(segments: int, opaque: Collection[int]) -> None:
    """Raise ConfigError where layers that are one block would have to hand on keys and values."""
    if segments > 1 and opaque:
        raise ConfigError(
            f"schedule.segments: {segments} segments need layers that hand on keys and values, and layer "
            f"{min(opaque)} is one opaque block; use segments = 1"
        )


def check_cut(length: int, segments: int, multiple: int) -> None:
    """Raise ConfigError where a sequence cannot be cut into so many segments."""
    if segments < 1:
        raise ConfigError(f"schedule.segments: {segments}; give at least 1 (1 keeps the sequence whole)")
    if multiple < 1:
        raise ConfigError(f"schedule.segment_multiple: {multiple}; give at least 1 (1 does not round)")
    if segments > length:
        raise ConfigError(
            f"schedule.segments: {segments} segments of a sequence of {length} tokens; give at most {length}"
        )
    if segments > 1 and segments * multiple > length:
        raise ConfigError(
            f"schedule.segments: {segments} segments of at least {multiple} tokens are more than the sequence's {length}; "
            f"give at most {max(1, length // multiple)} segments, or a schedule.segment_multiple of at most {length // segments}"
        )


def _check_evenness(evenness: float) -> None:
    if not 0 <= evenness <= 1:
        raise ConfigError(f"schedule.evenness: {evenness:g}; give 0 (computation-wise) to 1 (even)")


def _moved(bounds: Sequence[float], length: int, evenness: float) -> list[float]:
    """Every boundary moved that share of its way to the even one."""
    segments = len(bounds) + 1
    return [bound + evenness * (length * i / segments - bound) for i, bound in enumerate(bounds, start=1)]


def _rounded(bounds: Sequence[float], length: int, segments: int, multiple: int) -> tuple[int, ...]:
    """Lengths between boundaries, each moved to the nearest multiple that leaves no segment shorter than one."""
    check_cut(length, segments, multiple)
    blocks = length // multiple
    inner = [0]
    for left, bound in zip(range(segments - 1, 0, -1), bounds, strict=True):
        inner.append(min(max(math.floor(bound / multiple + 0.5), inner[-1] + 1), blocks - left))
    places = [*(multiple * each for each in inner), length]
    return tuple(end - start for start, end in itertools.pairwise(places))


def _costs(lengths: Sequence[int], seconds: Seconds) -> list[float]:
    return [seconds(tokens, sum(lengths[:i])) for i, tokens in enumerate(lengths)]


def _longest(length: int, segments: int, seconds: Seconds, multiple: int, bound: float) -> tuple[int, ...] | None:
    """Each segment as long as `bound` allows, or None when they do not reach the sequence's end."""
    lengths: list[int] = []
    start = 0
    for left in range(segments - 1, 0, -1):
        most = (length - start) // multiple - left  # in blocks; the others need one each
        blocks = bisect.bisect_right(range(1, most + 1), bound, key=lambda n: seconds(n * multiple, start))
        lengths.append(max(1, blocks) * multiple)
        start += lengths[-1]
    lengths.append(length - start)
    return tuple(lengths) if max(_costs(lengths, seconds)) <= bound else None


def _apart(values: Sequence[float], factor: float) -> Iterator[float]:
    """Of ascending values, some such that every value has one that is not below it and within `factor` of it."""
    first = last = values[0]
    for value in values:
        if value > first * factor:
            yield last
            first = value
        last = value
    yield last


def _least_sum(ends: Sequence[int], cost: Sequence[Sequence[float]], bound: float) -> tuple[tuple[int, ...], float]:
    """The segments whose costs sum to least, none above `bound`; none at all where it is too low.

    `cost[i][n]` is that of n + 1 blocks behind the first i.
    """
    total = [0.0] + [math.inf] * len(ends)  # of the first so many blocks
    before = [0] * (len(ends) + 1)
    for start, row in enumerate(cost):
        for blocks, each in enumerate(row, start=1):
            if each > bound:
                break
            if total[start] + each < total[start + blocks]:
                total[start + blocks], before[start + blocks] = total[start] + each, start
    if total[-1] == math.inf:
        return (), math.inf
    cuts = [len(ends)]
    while cuts[-1]:
        cuts.append(before[cuts[-1]])
    tokens = [0, *ends]
    return tuple(tokens[b] - tokens[a] for a, b in itertools.pairwise(reversed(cuts))), total[-1]
