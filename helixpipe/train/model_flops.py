"""Model FLOPs: what a step's tokens cost the model itself, however they are computed.

Forward and backward; nothing that is recomputed, no scores that a fused kernel computes again, no padding. Causal attention
counts the half that it shows, a window and documents what they show. Of what is frozen there are no weight gradients, and up to
the lowest part that is trained there are none of inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from helixpipe.parts.lora import is_adapter
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Work
from helixpipe.train.rows import Row


class ModelFlops:
    """Of one model. Documents of each length are asked for once."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        parts = shape.chain()
        lowest = next((at for at, part in enumerate(parts) if self._trains(part)), len(parts))
        # what costs the same: one part of the sort, whether it has gradients of inputs, the share of its weights' -> how many
        sorts: dict[Hashable, tuple[Part, bool, float]] = {}
        counts: Counter[Hashable] = Counter()
        for at, part in enumerate(parts):
            share = self._trained_share(part)
            sort = shape.alike(part), at > lowest, share
            sorts.setdefault(sort, (part, at > lowest, share))
            counts[sort] += 1
        self._sorts = [(*told, counts[sort]) for sort, told in sorts.items()]
        self._known: dict[int, float] = {}

    def of(self, rows: Sequence[Row], length: int) -> float:
        """FLOPs of a step with these rows of `length` tokens each."""
        found = Counter(tokens for row in rows for tokens in _documents(row, length))
        return math.fsum(count * self.of_document(tokens) for tokens, count in found.items())

    def of_document(self, tokens: int) -> float:
        """FLOPs of one document by itself."""
        if tokens not in self._known:
            work = Work(self._shape, Batch(1, (tokens,)))
            self._known[tokens] = math.fsum(
                count * self._part(part, has_inputs, share, work) for part, has_inputs, share, count in self._sorts
            )
        return self._known[tokens]

    def _part(self, part: Part, has_inputs: bool, share: float, work: Work) -> float:
        about = self._shape.about(part)
        forward, weights = about.forward_flops(part, work), about.weight_flops(part, work)
        # of attention, what a kernel that kept the scores would compute
        inputs = 2 * forward if about.attends else about.backward_flops(part, work) - weights
        return forward + inputs * has_inputs + weights * share

    def _trains(self, part: Part) -> bool:
        shape = self._shape
        return any(shape.trains(shape.parameter_name(part, name)) for name in shape.parameters(part))

    def _trained_share(self, part: Part) -> float:
        """Of the matrices that `weight_flops` counts, the share that is trained."""
        shape = self._shape
        sizes = {
            shape.parameter_name(part, name): math.prod(size)
            for name, size in shape.parameters(part).items()
            if len(size) == 2 and (shape.lora is None or is_adapter(name))
        }
        return sum(size for name, size in sizes.items() if shape.trains(name)) / max(sum(sizes.values()), 1)


def _documents(row: Row, length: int) -> list[int]:
    """Tokens of each document of a row, padding left out; the row itself where attention goes across documents."""
    left, found = int(row.counts.sum()), []
    for tokens in row.documents or (length,):
        if left <= 0:
            break
        found.append(min(tokens, left))
        left -= tokens
    return found
