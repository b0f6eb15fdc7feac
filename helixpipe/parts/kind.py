"""Kind: everything there is to say of one kind of part, without torch. One subclass a file; the registry of them.

    reads, makes            values, by name                       what flows
    parameters              name -> shape                         what is placed, sent, divided
    *_flops, moved, ...     of one segment of one micro-batch     what it costs
    saved, put_off, ...     bytes by name                         what it keeps

A kind describes itself from a `Work`: a model's shape, a batch, a segment, and how activations are kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

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
        """All of a backward: twice the forward."""
        return 2.0 * self.forward_flops(part, work)

    def weight_flops(self, part: Part, work: Work) -> float:
        """The share of the backward that makes weight gradients: a product as large as the forward's."""
        return self.forward_flops(part, work)

    def moved_elements(self, shape: ModelShape) -> float:
        """Elements a token that norms, activations, rotations and residual adds read and write."""
        return 0.0

    def moved(self, part: Part, work: Work) -> float:
        """The same of all tokens of a segment."""
        return self.moved_elements(work.shape) * work.tokens

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

    def linears(self, part: Part, work: Work) -> dict[str, tuple[int, int]]:
        """Name of a linear layer's input -> (all its outputs, its input), elements a token."""
        return {}

    def put_off(self, part: Part, work: Work) -> Kept:
        """What an I leaves for its W: input and output gradient of each linear layer; nothing where it is chunked."""
        if work.slices(part):
            return {}
        unit = work.tokens * work.keeping.element_bytes
        linears = self.linears(part, work).items()
        return {name: unit * into for name, (_, into) in linears} | {
            f"d {name}": unit * out for name, (out, _) in linears
        }

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
        elements = max((math.prod(shape) for shape in self.parameters(work.shape).values()), default=0)
        copies = work.keeping.processes // (work.keeping.tensor_parallel if self.divides else 1)
        return elements * work.keeping.element_bytes * max(copies, 1)

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


def linear(name: str, out: int, into: int, bias: bool) -> Shapes:
    """The parameters of a linear layer."""
    found: Shapes = {f"{name}.weight": (out, into)}
    return found | {f"{name}.bias": (out,)} if bias else found
