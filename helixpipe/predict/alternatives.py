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
from dataclasses import dataclass

from helixpipe.parts.part import attention_part, ends, layer_parts
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


def alternatives(setting: Setting, ranks: int, microbatches: int) -> tuple[Alternative, ...]:
    """Those that this many sequences and tokens allow."""
    if ranks == 1:
        return ()
    found = [_sharded(setting, ranks, microbatches)]
    if setting.sequence_length % (2 * ranks) == 0 and not setting.shape.opaque:
        found.append(_context(setting, ranks, microbatches))
    return tuple(found)


def _sharded(setting: Setting, ranks: int, microbatches: int) -> Alternative:
    turns = math.ceil(microbatches / ranks)  # of the rank with the most
    compute_s = _compute_s(setting)
    message_s = _weights_s(setting, ranks)
    activations = _activations(setting)
    return _alternative("fsdp", setting, ranks, turns, compute_s, max(compute_s, message_s), activations)


def _context(setting: Setting, ranks: int, microbatches: int) -> Alternative:
    """Zigzag layout, so that every rank has an equal share of a causal attention."""
    shape, keeping = setting.shape, setting.keeping
    tokens = setting.microbatch_size * setting.sequence_length
    ring = 2 * tokens * shape.kv_size * (ranks - 1) / ranks / setting.tensor_parallel
    hops = setting.link.latency_s * (ranks - 1)
    forward_ring = hops + ring * keeping.element_bytes / setting.link.bytes_per_s
    backward_ring = hops + ring * (keeping.element_bytes + keeping.wide_bytes) / setting.link.bytes_per_s
    forwards = 2 if keeping.recompute == "full" else 1
    slower = 0.0  # a layer, in the mean
    for layer, layers in shape.sorts().items():
        forward = setting.costs.forward_s(attention_part(layer), setting.whole, 0) / ranks
        backward = setting.costs.input_s(attention_part(layer), setting.whole, 0) / ranks
        slower += layers * (forwards * (max(forward, forward_ring) - forward) + max(backward, backward_ring) - backward)
    compute_s = _compute_s(setting) / ranks
    step_s = max(compute_s + slower * shape.layers, _weights_s(setting, ranks))
    activations = math.ceil(_activations(setting) / ranks)
    return _alternative("context_parallel", setting, ranks, microbatches, compute_s, step_s, activations)


def _alternative(
    name: str, setting: Setting, ranks: int, turns: int, compute_s: float, step_s: float, activations: int
) -> Alternative:
    share, keeping = setting.share, setting.keeping
    narrow, wide = keeping.element_bytes, keeping.wide_bytes
    copy = narrow if narrow != wide else 0
    shared = share.parameter_count * (4 * wide + copy) / ranks
    layers = [layer_parts(layer, layer in share.opaque) for layer in range(share.layers)]
    largest = max(sum(share.parameter_elements(p).values()) for p in (*layers, ends(share.layers)[1:]))
    whole = 2 * largest * (narrow + wide)  # gathered weights and their gradients: this layer and the next
    standing = math.ceil(shared + whole)
    return Alternative(name, turns * step_s, turns * compute_s, activations, standing + activations)


def _compute_s(setting: Setting) -> float:
    """One micro-batch, forward, recompute and backward, on one rank; chunked parts with their one more forward."""
    alone = _alone(setting)
    seconds = action_seconds(alone, setting.shape, setting.whole, setting.costs, setting.keeping)
    return math.fsum(map(seconds, alone.ranks[0]))


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
