"""attn: attention, q, k, v to o. Parameterless, so it can run on any rank; the one part that is quadratic.

With a window it is cut into tiles (`model.tiles`): as many rows at a time as the window is wide, each tile a kernel call,
half of them of tokens in reversed order. Capped scores have no fused kernel: blocks of them are there (`model.capped`).
"""

from __future__ import annotations

import math

from helixpipe.parts.kind import Kept, Kind, register
from helixpipe.parts.part import Part
from helixpipe.parts.work import Work

# torch's CPU kernel: from so many queries on, so many rows of a tile; and its columns
CPU_TILES = ((768, 256), (192, 64), (0, 32))
CPU_COLUMNS = 512
# of capped scores, and how many blocks of them are there in a forward and in a backward
CAPPED_ROWS, CAPPED_COLUMNS = 256, 1024
CAPPED_FORWARD, CAPPED_BACKWARD = 2, 4
# from so many tokens on, a call of it for one head costs nothing beside that head's work
TOKENS_OF_A_CALL = 2048


def heads_at_once(device: str, batch: int, tokens: int, kv_heads: int, threads: int) -> int:
    """Key heads, with their queries', whose backward runs at a time where gradients may take the places of q, k and v.

    A CPU kernel gives each thread whole heads: as few as give all threads the same. An accelerator has all at a time: its
    kernel runs beside others', pays for launches, and one head leaves most of it idle.
    """
    if device != "cpu" or tokens < TOKENS_OF_A_CALL:
        return kv_heads
    few = threads // math.gcd(batch, threads)
    return few if 2 * few <= kv_heads else kv_heads


@register
class AttnKind(Kind):
    name = "attn"
    reads = ("q", "k", "v")
    makes = ("o",)
    attends = True
    has_parameters = False
    over_tokens = False
    units = 3

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        return (*work.lead, work.shape.q_size)

    def forward_flops(self, part: Part, work: Work) -> float:
        """Causal attention counts the half that kernels compute, a window and documents what they show."""
        seen_pairs = work.batch.pairs(work.segment, work.shape.causal, work.shape.window_of(part.layer))
        return 4.0 * work.shape.q_size * seen_pairs

    def backward_flops(self, part: Part, work: Work) -> float:
        """2.5 times the forward: a fused kernel computes the scores again."""
        return 2.5 * self.forward_flops(part, work)

    def weight_flops(self, part: Part, work: Work) -> float:
        return 0.0

    def saved(self, part: Part, work: Work) -> Kept:
        return work.values(part.reads) | self.kept(part, work)

    def kept(self, part: Part, work: Work) -> Kept:
        """The output and the log-sum-exp: with them a recompute need not attend again."""
        lse = work.tokens * work.shape.heads * work.keeping.wide_bytes
        return work.values(part.makes) | {f"lse.{part.layer}": lse}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """What the kernel holds, and of segments the attention to an earlier one before it is merged."""
        if rows := self._tile(part, work):
            return self._tiled_forward(part, work, rows)
        found = self._kernel(work, backward=False)
        if not work.segment:
            return found
        q, before = work.shape.q_size, work.batch.microbatch_size * work.batch.start(work.segment)
        if work.keeping.device == "cuda":  # which joins all earlier keys and values
            found += 2 * before * work.shape.kv_size * work.keeping.element_bytes
        return found + q * (work.unit if work.is_wide else work.unit + 2 * work.wide_unit)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """Of segments: at an earlier one's keys, or at all of them joined, with q's gradient summed in float32 or wider."""
        if rows := self._tile(part, work):
            return self._tiled_backward(part, work, rows)
        shape, keeping, batch = work.shape, work.keeping, work.batch
        inputs, kernel = super().backward_workspace(part, work), self._kernel(work, backward=True)
        if not work.segment:
            return inputs + kernel
        earlier = [batch.tokens(segment) for segment in range(work.segment)]
        is_cuda = keeping.device == "cuda"  # which joins keys and values, and gets the gradients of all at once
        joined = 2 * (sum(earlier) if is_cuda else max(earlier)) * shape.kv_size
        found = joined * keeping.element_bytes * (2 if is_cuda else 1) + shape.q_size * work.unit
        if is_cuda and work.segment == len(batch.segment_lengths) - 1 and not work.is_wide:
            found += joined * keeping.wide_bytes  # what it owes is widened while the narrow gradients are there
        return inputs + found + max(kernel, 0 if work.is_wide else shape.q_size * work.wide_unit)

    def in_place(self, part: Part, work: Work) -> int:
        """All gradients but those of the heads at work, whose share of o's the kernel copies.

        None of segments, whose keys and values wait for others.
        """
        keeping, shape = work.keeping, work.shape
        is_spread = keeping.processes > keeping.tensor_parallel
        if is_spread or len(work.batch.segment_lengths) > 1:
            return 0
        heads = shape.kv_heads // keeping.tensor_parallel
        at_once = heads_at_once(keeping.device, work.batch.microbatch_size, work.length, heads, keeping.threads)
        if at_once == heads:
            return 0
        gradients, output = (sum(map(work.value_bytes, values)) for values in (part.reads, part.makes))
        rows = self._tile(part, work)
        if rows or shape.softcap:  # whose copies are in the workspace, those of other heads too
            of_all = self.backward_workspace(part, work) - (0 if shape.softcap else self._kernel(work, True, rows))
            return of_all - of_all * at_once // heads
        return gradients - (gradients + output) * at_once // heads

    @staticmethod
    def _tile(part: Part, work: Work) -> int:
        """Rows of a tile, where a window cuts a segment's attention into tiles; else 0."""
        window, stop = work.shape.window_of(part.layer), work.batch.start(work.segment) + work.length
        if not window or window >= (stop if work.shape.causal else work.batch.sequence_length):
            return 0
        return min(window if work.shape.causal else 2 * window - 1, work.length)

    def _tiled_forward(self, part: Part, work: Work, rows: int) -> int:
        """A tile's queries, keys and values in reversed order, its output, and all outputs in float32 or wider."""
        shape, keeping = work.shape, work.keeping
        tile = work.batch.microbatch_size * rows * keeping.element_bytes
        found = self._kernel(work, False, rows) + 2 * tile * (shape.q_size + shape.kv_size)
        if keeping.device == "cuda" and work.segment:
            found += 2 * self._earlier(part, work) * shape.kv_size * keeping.element_bytes
        return found + (0 if work.is_wide else shape.q_size * work.wide_unit)

    def _tiled_backward(self, part: Part, work: Work, rows: int) -> int:
        """All gradients in float32 or wider, those of earlier keys, and a tile's inputs and gradients in both orders."""
        shape, keeping = work.shape, work.keeping
        tile = work.batch.microbatch_size * rows * keeping.element_bytes
        found = super().backward_workspace(part, work) + tile * (5 * shape.q_size + 6 * shape.kv_size)
        if not work.is_wide:
            found += (shape.q_size + 2 * shape.kv_size) * work.wide_unit
        if work.segment:
            earlier = [self._tail(part, work, s) for s in self._seen(part, work)]
            is_cuda = keeping.device == "cuda"
            most = sum(earlier) if is_cuda else max(earlier, default=0)
            found += 2 * most * shape.kv_size * (keeping.wide_bytes + (keeping.element_bytes if is_cuda else 0))
        return found + self._kernel(work, True, rows)

    @staticmethod
    def _seen(part: Part, work: Work) -> range:
        return work.batch.seen(work.segment, work.shape.window_of(part.layer))

    @staticmethod
    def _tail(part: Part, work: Work, segment: int) -> int:
        """Tokens of a segment that later ones see, of all sequences."""
        batch = work.batch
        return batch.microbatch_size * batch.tail(segment, work.shape.window_of(part.layer))

    def _earlier(self, part: Part, work: Work) -> int:
        return sum(self._tail(part, work, s) for s in self._seen(part, work))

    @staticmethod
    def _kernel(work: Work, backward: bool, rows: int = 0) -> int:
        """CPU: a tile of scores a thread, two in a backward. CUDA: q's gradient in float32, and those of repeated heads.

        `rows`: how many queries and keys there are in a call; 0 is all.
        """
        shape = work.shape
        length = rows or work.length
        if shape.softcap:
            blocks = CAPPED_BACKWARD if backward else CAPPED_FORWARD
            elements = shape.heads * min(CAPPED_ROWS, length) * min(CAPPED_COLUMNS, length) * blocks
            context = work.keeping.processes // work.keeping.tensor_parallel
            summed = 2 * shape.kv_size * work.wide_unit if backward and not work.is_wide and not rows else 0
            return work.batch.microbatch_size * context * elements * work.keeping.wide_bytes + summed
        if work.keeping.device == "cuda":
            tokens = work.tokens if not rows else work.batch.microbatch_size * rows
            repeated = 2 * shape.q_size * tokens * work.keeping.element_bytes if shape.kv_heads != shape.heads else 0
            return shape.q_size * tokens * work.keeping.wide_bytes + repeated if backward else 0
        tall = next(tall for least, tall in CPU_TILES if length // work.keeping.processes >= least)
        columns = min(CPU_COLUMNS, length)
        elements = tall * (2 * columns if backward else columns + shape.head_dim)
        return work.keeping.processes * work.keeping.threads * elements * work.keeping.wide_bytes
