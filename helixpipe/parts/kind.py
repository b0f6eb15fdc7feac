"""Kind: everything there is to say of one kind of part, without torch. One subclass a file; the registry of them.

    reads, makes            values, by name                       what flows
    parameters              name -> shape                         what is placed, sent, divided
    *_flops, moved, ...     of one segment of one micro-batch     what it costs
    saved, put_off, ...     bytes by name                         what it keeps

A kind describes itself from a `Work`: a model's shape, a batch, a segment, and how activations are kept.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from helixpipe.parts.lora import DOWN, UP, Lora, adapted, is_adapter

if TYPE_CHECKING:
    from helixpipe.parts.part import Part
    from helixpipe.parts.shape import ModelShape
    from helixpipe.parts.work import Keeping, Work

Shapes = dict[str, tuple[int, ...]]
"""Name within a part -> shape of a parameter."""
Kept = dict[str, int]
"""What is kept, by a name that is the same wherever it is one tensor -> bytes."""


class Kind:
    """The defaults are those of a part from [b, s, h] to [b, s, h] whose matrices multiply every token once."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    makes: ClassVar[tuple[str, ...]]
    beside: ClassVar[tuple[str, ...]] = ()
    """What its module is called with behind the values that it reads."""
    ends_layer: ClassVar[bool] = False
    """Whether what it makes belongs to the next layer."""
    attends: ClassVar[bool] = False
    """Whether it is attention: parameterless, quadratic, and what a selective recompute leaves out."""
    cheap: ClassVar[bool] = False
    """Whether what it makes costs so little that a recomputed graph makes it again rather than keep it."""
    opaque: ClassVar[bool] = False
    """Whether it is a whole layer, into which nobody looks."""
    sharded: ClassVar[bool] = False
    """Whether its parts are shards: slices of one weight, of which each makes a value of its own."""
    joins: ClassVar[bool] = False
    """Whether it reads what every shard makes."""
    graphed: ClassVar[bool] = False
    """Whether its graph keeps next to nothing, so that it is kept under every policy, and what it reads is not."""
    one_gradient: ClassVar[bool] = False
    """Whether the gradients of what its shards make are one tensor, on the rank of whoever joins them."""
    wide: ClassVar[bool] = False
    """Whether what it makes is float32 or wider, whatever a run computes in."""
    alone: ClassVar[bool] = False
    """Whether it is recomputed by itself, with no other part."""
    splits: ClassVar[bool] = False
    """Whether its weight gradients can be put off to a W."""
    hands_on: ClassVar[bool] = False
    """Whether what it makes is what it reads, the same tensor: it computes, keeps and costs nothing."""
    has_parameters: ClassVar[bool] = True
    divides: ClassVar[bool] = True
    """Whether tensor-parallel ranks divide its matrices."""
    over_tokens: ClassVar[bool] = True
    """Whether tensor-parallel ranks share what it makes by tokens; else by heads."""
    units: ClassVar[int] = 0
    """A forward's duration, to draw with when nothing is known of model or machine."""

    def of(self, part: Part, shape: ModelShape) -> Kind:
        """What a part of this kind is in one model: itself, or a variant of it."""
        return self

    def parameters(self, shape: ModelShape) -> Shapes:
        return {}

    def parameter_name(self, part: Part, name: str, shape: ModelShape) -> str:
        """The one name of a parameter in checkpoints, gradients and messages, whatever the placement."""
        return f"layers.{part.layer}.{part.kind}.{name}"

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        """Of a value that it makes, for one segment."""
        return (*work.lead, work.shape.hidden)

    def chunk(self, keeping: Keeping) -> int:
        """Tokens at a time where it runs in slices; 0 is all at once."""
        return 0

    def forward_flops(self, part: Part, work: Work) -> float:
        """Multiply-adds counted twice."""
        matrices = [shape for shape in self.parameters(work.shape).values() if len(shape) == 2]
        return 2.0 * work.tokens * sum(rows * columns for rows, columns in matrices)

    def backward_flops(self, part: Part, work: Work) -> float:
        """All of a backward: the gradients of inputs take as much as the forward, and so do those of all weights."""
        return self.forward_flops(part, work) + self.weight_flops(part, work)

    def weight_flops(self, part: Part, work: Work) -> float:
        """The share of the backward that makes weight gradients: a product as large as the forward's of what is trained."""
        if work.shape.lora is None:
            return self.forward_flops(part, work)
        return 2.0 * work.tokens * sum(map(math.prod, self._trained(work.shape)))

    def moved_elements(self, shape: ModelShape) -> float:
        """Elements a token that norms, activations, rotations and residual adds read and write."""
        return 0.0

    def moved(self, part: Part, work: Work) -> float:
        """The same of all tokens of a segment."""
        added = sum(2.0 * out for out, _ in self.adapted(work.shape).values())  # to what the linear layer made
        return (self.moved_elements(work.shape) + added) * work.tokens

    @property
    def exchanges(self) -> int:
        """Messages of [b, s, h] inside a tensor-parallel group in a forward; as many in a backward."""
        return 0

    @property
    def vocabulary_exchanges(self) -> int:
        """More of them where the group divides the vocabulary too: Megatron does, this runtime does not."""
        return 0

    def saved(self, part: Part, work: Work) -> Kept:
        """What autograd saves: the values it reads where an operation needs them, and its inside."""
        return work.values(part.reads)

    def kept(self, part: Part, work: Work) -> Kept:
        """What a selective recompute keeps beside a chunk's inputs."""
        return {}

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        """Name of linear layers' input -> (each one's output, the input), elements a token."""
        return {}

    def adapted(self, shape: ModelShape) -> dict[str, tuple[int, int]]:
        """Its linear layers that have an adapter -> (output, input), elements a token."""
        return {} if shape.lora is None else adapted(self.parameters(shape))

    def narrow(self, part: Part, work: Work) -> Kept:
        """What adapters make between their two matrices, on each tensor-parallel rank."""
        rank = work.shape.lora.rank if work.shape.lora is not None else 0
        each = work.unit * rank * work.keeping.tensor_parallel
        return {f"{part}.{name}.narrow": each for name in self.adapted(work.shape)}

    def _trained(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Sizes of the matrices that have gradients; all of them where there are no adapters."""
        return [size for name, size in self.parameters(shape).items() if shape.lora is None or is_adapter(name)]

    def put_off(self, part: Part, work: Work) -> Kept:
        """What an I leaves for its W: input and output gradient of each linear layer; nothing where it is chunked.

        Of those with adapters alone, where there are any: their own as well.
        """
        if work.slices(part):
            return {}
        narrow = self.narrow(part, work)
        found = narrow | {f"d {name}": size for name, size in narrow.items()}
        for name, (outs, into) in self.linears(part, work).items():
            made = [out for each, out in outs.items() if work.shape.lora is None or f"{part}.{each}.narrow" in narrow]
            found |= {name: work.unit * into, f"d {name}": work.unit * sum(made)} if made else {}
        return found

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """Bytes at most while its forward runs, beyond its inputs, its outputs and, with a graph, what that saves."""
        return 0

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """Bytes at most while its backward runs, beyond what is saved and the gradients of its outputs.

        The gradients of its inputs are among them, and those of its largest matrix, which are added to the parameter's.
        `unread`: it ends a chunk that was recomputed, so nobody else has the gradient of what it makes.
        """
        inputs = sum(map(work.value_bytes, part.reads))
        return inputs + self.largest_matrix(work)

    def in_place(self, part: Part, work: Work) -> int:
        """Bytes of its inputs' gradients that need no room of their own where nobody else reads these inputs."""
        return 0

    def largest_matrix(self, work: Work) -> int:
        """Bytes of a weight gradient before it is added to the parameter's, on all processes of a rank together."""
        elements = max(map(math.prod, self._trained(work.shape)), default=0)
        copies = work.keeping.processes // (work.keeping.tensor_parallel if self.divides else 1)
        return elements * work.keeping.element_bytes * max(copies, 1)

    def timed_as(self, part: Part) -> tuple[tuple[str, float], ...]:
        """Kinds that a profile times, and how many times each, which take as long: itself, where it is timed."""
        return ((self.name, 1.0),)

    def inside(self, part: Part) -> tuple[Part, ...]:
        """The parts that it is made of, as far as costs go: itself, but for an opaque layer."""
        return (part,)


KINDS: dict[str, Kind] = {}
"""By name, in the order of their registration."""
_MAKERS: dict[str, Kind] = {}


def register(kind: type[Kind]) -> type[Kind]:
    """Class decorator: the kind is known by its name from here on."""
    KINDS[kind.name] = made = kind()
    for value in kind.makes:
        _MAKERS.setdefault(value, made)
    return kind


def maker(value: str) -> Kind:
    """The kind that makes values of a name; where several do, they are alike."""
    return _MAKERS[value]


@cache
def is_wide(value: str) -> bool:
    """Whether a value, by its text or its name, is float32 or wider whatever a run computes in."""
    return maker(value.partition(".")[0]).wide


def linear(name: str, out: int, into: int, bias: bool, lora: Lora | None = None) -> Shapes:
    """The parameters of a linear layer, and of the adapter that it has if it is a target."""
    found: Shapes = {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})
    if lora is None or name not in lora.targets:
        return found
    return found | {f"{name}.{DOWN}.weight": (lora.rank, into), f"{name}.{UP}.weight": (out, lora.rank)}
