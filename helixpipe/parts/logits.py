"""logits: a shard of the head's words, f to scores: of each token its words' log-sum-exp, and the target's logit or 0.

    f [b, s, h] ── words of this shard ── logits ──┬── log(sum(exp)) ──┐
                                   target's, or 0 ─┴───────────────────┴── scores [b, s, 2], float32 or wider

Two numbers a token are all that others need of it. It may run in slices.
"""

from __future__ import annotations

from functools import cache

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.part import FIRST, LAST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import rows_of, sliced
from helixpipe.parts.work import Keeping, Work


@register
class LogitsKind(Kind):
    name = "logits"
    reads = ("f",)
    beside = ("targets",)
    makes = ("scores",)
    sharded = True
    wide = True
    alone = True
    divides = False
    splits = True

    def __init__(self, words: int = 0) -> None:
        """`words`: how many the shard has."""
        self.words = words

    def of(self, part: Part, shape: ModelShape) -> Kind:
        return _of_words(len(rows_of(part.shard, part.shards, shape.vocabulary)))

    def parameters(self, shape: ModelShape) -> Shapes:
        """Where head and table are one, so are their shards."""
        return linear("output", self.words, shape.hidden, shape.head_transform)

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        table = f"{FIRST}.tokens.weight" if shape.tied else f"{LAST}.output.weight"
        whole = table if name == "output.weight" else f"{LAST}.bias"
        return sliced(whole, part.shard, part.shards, shape.vocabulary)

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        """Log-sum-exp, and the target's logit or 0."""
        return (*work.lead, 2)

    def chunk(self, keeping: Keeping) -> int:
        return keeping.head_chunk

    def moved_elements(self, shape: ModelShape) -> float:
        return (6.0 if shape.head_softcap else 4.0) * self.words

    @property
    def vocabulary_exchanges(self) -> int:
        """As those of a whole head."""
        return 1

    def timed_as(self, part: Part) -> tuple[tuple[str, float], ...]:
        """Its share of the whole head, of which nearly all goes by words."""
        return ((LAST, 1.0 / part.shards),)

    def saved(self, part: Part, work: Work) -> Kept:
        """What is multiplied, and the exponentials, in the place of the logits."""
        reads = work.values(part.reads)
        if work.slices(part):
            return reads
        found = reads | {f"{part}.exponentials": self.words * work.wide_unit, f"{part}.sums": work.wide_unit}
        if work.shape.head_softcap:
            found[f"{part}.capped"] = self.words * work.unit
        return found

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        return {str(part.reads[0]): ({"output": self.words}, work.shape.hidden)}

    def put_off(self, part: Part, work: Work) -> Kept:
        """By a name of this shard's: others of the rank put off gradients of theirs."""
        left = super().put_off(part, work)
        return {f"d {part}" if name.startswith("d ") else name: size for name, size in left.items()}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """Logits in the run's precision beside wide ones; all of them where there is no graph to keep them."""
        if work.slices(part):
            return self.forward_workspace(part, work.sliced(part), graph=False)
        capped = bool(work.shape.head_softcap)
        narrow = 0 if (work.is_wide and not capped) or (graph and capped) else work.unit
        return self.words * (narrow + (0 if graph else work.wide_unit))

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """The logits' gradient takes the exponentials' place; a narrow one, and one of a softcap, has its own."""
        h = work.shape.hidden * work.unit
        if work.slices(part):
            piece = work.sliced(part)
            graph = sum(self.saved(part, piece).values())
            return h + graph + self.backward_workspace(part, piece)
        after = h + self.largest_matrix(work)
        if work.is_wide and not work.shape.head_softcap:
            return after
        gone = self.words * (work.unit - work.wide_unit)
        return max(self.words * work.unit, after + gone)


_of_words = cache(LogitsKind)
