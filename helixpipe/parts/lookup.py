"""lookup: a shard of the table, tokens to e: the rows of its own words, 0 where the word is another shard's."""

from __future__ import annotations

from functools import cache

from helixpipe.parts.kind import Kept, Kind, Shapes, register
from helixpipe.parts.part import FIRST, Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import rows_of, sliced
from helixpipe.parts.work import Work


@register
class LookupKind(Kind):
    name = "lookup"
    reads = ()
    beside = ("tokens",)
    makes = ("e",)
    sharded = True
    graphed = True
    one_gradient = True
    alone = True
    divides = False

    def __init__(self, words: int = 0) -> None:
        """`words`: rows of the table that the shard has."""
        self.words = words

    def of(self, part: Part, shape: ModelShape) -> Kind:
        return _of_words(len(rows_of(part.shard, part.shards, shape.vocabulary)))

    def parameters(self, shape: ModelShape) -> Shapes:
        return {"tokens.weight": (self.words, shape.hidden)}

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        return sliced(f"{FIRST}.{name}", part.shard, part.shards, shape.vocabulary)

    def forward_flops(self, part: Part, work: Work) -> float:
        return 0.0

    def moved_elements(self, shape: ModelShape) -> float:
        return 2.0 * shape.hidden

    @property
    def vocabulary_exchanges(self) -> int:
        """As those of a whole table."""
        return 1

    def timed_as(self, part: Part) -> tuple[tuple[str, float], ...]:
        """It writes as much as a whole table's."""
        return ((FIRST, 1.0),)

    def saved(self, part: Part, work: Work) -> Kept:
        """The tokens, which are the batch's."""
        return {}


_of_words = cache(LookupKind)
