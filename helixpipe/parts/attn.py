"""attn: attention, q, k, v to o. Parameterless, so it can run on any rank; the one part that is quadratic."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, register
from helixpipe.parts.part import Part
from helixpipe.parts.work import Work


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
        """Causal attention counts the half that kernels compute."""
        start = work.batch.start(work.segment)
        end = start + work.length
        pairs = (end**2 - start**2) / 2 if work.shape.causal else (end - start) * work.batch.sequence_length
        return 4.0 * work.batch.microbatch_size * work.shape.q_size * pairs

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
