"""What is not a pipeline, priced beside it on the same accelerators: sharded data parallelism and context parallelism.

    fsdp               every rank runs whole micro-batches of its own; weights are gathered layer by layer, forward and
                       backward, and gradients scattered: 3 P (N-1)/N elements a rank, once a micro-batch (torch's fully
                       sharded data parallel without gradients held back)
    context_parallel   every micro-batch is spread over all ranks along the sequence; K and V go round (ring attention),
                       2 b s h_kv (N-1)/N elements a layer forward, twice that backward and dK, dV in float32 with it;
                       weights as in fsdp

Messages travel under compute, so a layer takes the longer of the two. Memory: weights, gradients and optimizer are
divided by all ranks, two layers are whole at a time; activations are those of the micro-batch, or of its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from helixpipe.parts.part import attention_part, ends, layer_parts
from helixpipe.parts.work import Batch
from helixpipe.predict.cost import action_seconds
from helixpipe.predict.estimate import Setting
from helixpipe.predict.memory import peak_activation_bytes
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule


@dataclass(frozen=True)
class Alternative:
    """A way to train that is not a pipeline; the same on every rank."""

    name: str
    makespan_s: float
    busy_s: float
    """Of which it computes."""
    peak_activation_bytes: int
    peak_bytes: int


def alternatives(setting: Setting, ranks: int, microbatches: int | Sequence[Batch]) -> tuple[Alternative, ...]:
    """Those that this many sequences and tokens allow. `microbatches`: how many, or of each its batch, not cut."""
    measured = getattr(setting.profile, "context_parallel", 1) > 1  # of other shares of a sequence than these have
    if ranks == 1 or measured:
        return ()
    batches = [setting.whole] * microbatches if isinstance(microbatches, int) else list(microbatches)
    found = [_sharded(setting, ranks, batches)]
    if setting.sequence_length % (2 * ranks) == 0 and not setting.shape.opaque:
        found.append(_context(setting, ranks, batches))
    return tuple(found)


def _sharded(setting: Setting, ranks: int, batches: list[Batch]) -> Alternative:
    """Ranks take micro-batches in turns, and gather weights together: a turn lasts as long as its dearest one."""
    turns = [batches[first : first + ranks] for first in range(0, len(batches), ranks)]
    compute_s, message_s = _compute_s(setting), _weights_s(setting, ranks)
    step_s = math.fsum(max(message_s, *map(compute_s, turn)) for turn in turns)
    busy_s = max(math.fsum(map(compute_s, batches[rank::ranks])) for rank in range(ranks))
    return _alternative("fsdp", setting, ranks, step_s, busy_s, _activations(setting))


def _context(setting: Setting, ranks: int, batches: list[Batch]) -> Alternative:
    """Zigzag layout, so that every rank has an equal share of a causal attention."""
    shape, keeping = setting.shape, setting.keeping
    tokens = setting.microbatch_size * setting.sequence_length
    ring = 2 * tokens * shape.kv_size * (ranks - 1) / ranks / setting.tensor_parallel
    hops = setting.link.latency_s * (ranks - 1)
    forward_ring = hops + ring * keeping.element_bytes / setting.link.bytes_per_s
    backward_ring = hops + ring * (keeping.element_bytes + keeping.wide_bytes) / setting.link.bytes_per_s
    forwards = 2 if keeping.recompute == "full" else 1
    computed_s, message_s = _compute_s(setting), _weights_s(setting, ranks)

    @cache
    def taken_s(batch: Batch) -> float:
        slower = 0.0  # a layer, in the mean
        for layer, layers in shape.sorts().items():
            forward = setting.costs.forward_s(attention_part(layer), batch, 0) / ranks
            backward = setting.costs.input_s(attention_part(layer), batch, 0) / ranks
            slower += layers * (
                forwards * (max(forward, forward_ring) - forward) + max(backward, backward_ring) - backward
            )
        return max(computed_s(batch) / ranks + slower * shape.layers, message_s)

    step_s = math.fsum(map(taken_s, batches))
    busy_s = math.fsum(computed_s(batch) / ranks for batch in batches)
    activations = math.ceil(_activations(setting) / ranks)
    return _alternative("context_parallel", setting, ranks, step_s, busy_s, activations)


def _alternative(
    name: str, setting: Setting, ranks: int, step_s: float, busy_s: float, activations: int
) -> Alternative:
    share, keeping = setting.share, setting.keeping
    narrow, wide = keeping.element_bytes, keeping.wide_bytes
    copy = narrow if narrow != wide else 0
    shared = share.parameter_count * (4 * wide + copy) / ranks
    layers = [layer_parts(layer, layer in share.opaque) for layer in range(share.layers)]
    largest = max(sum(share.parameter_elements(p).values()) for p in (*layers, ends(share.layers)[1:]))
    whole = 2 * largest * (narrow + wide)  # gathered weights and their gradients: this layer and the next
    standing = math.ceil(shared + whole)
    return Alternative(name, step_s, busy_s, activations, standing + activations)


def _compute_s(setting: Setting) -> Callable[[Batch], float]:
    """One micro-batch, forward, recompute and backward, on one rank; chunked parts with their one more forward."""
    alone = _alone(setting)

    @cache
    def taken_s(batch: Batch) -> float:
        seconds = action_seconds(alone, setting.shape, batch, setting.costs, setting.keeping)
        return math.fsum(map(seconds, alone.ranks[0]))

    return taken_s


def _alone(setting: Setting) -> Schedule:
    """One micro-batch through the whole model."""
    return build_schedule("1f1b", ranks=1, model=setting.shape, microbatches=1)


def _weights_s(setting: Setting, ranks: int) -> float:
    """Two gathers in the run's precision and one scatter of gradients, of a rank's tensor-parallel share."""
    narrow, wide = setting.keeping.element_bytes, setting.keeping.wide_bytes
    elements = setting.share.parameter_count * (ranks - 1) / ranks
    return 3 * setting.shape.layers * setting.link.latency_s + elements * (2 * narrow + wide) / setting.link.bytes_per_s


def _activations(setting: Setting) -> int:
    """Of one micro-batch."""
    program = lower(_alone(setting), setting.shape, setting.whole)
    return math.ceil(peak_activation_bytes(program, setting.keeping)[0] / setting.tensor_parallel)
