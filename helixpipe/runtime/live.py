"""Live: values of a stage between their maker and their last reader, and what their parts need beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.parts.kind import is_wide
from helixpipe.parts.part import Part, Value, loss_of
from helixpipe.parts.work import Work
from helixpipe.runtime.ledger import Kept, Ledger
from helixpipe.schedule.chunks import Chunk


class Live:
    """Values and their places on the ledger. A value is gone when it is dropped: nobody else may hold it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tensors: dict[Value, Tensor] = {}
        self._kept: dict[Value, Kept] = {}

    def __getitem__(self, value: Value) -> Tensor:
        return self._tensors[value]

    def __contains__(self, value: object) -> bool:
        return value in self._tensors

    def __iter__(self) -> Iterator[Value]:
        return iter(self._tensors)

    def read(self, values: Iterable[Value]) -> list[Tensor]:
        return [self._tensors[value] for value in values]

    def put(self, value: Value, tensor: Tensor, kept: Kept | None = None) -> None:
        """`kept`: its place on the ledger, where it has one already."""
        self._tensors[value] = tensor
        self._kept[value] = self._ledger.keep(tensor) if kept is None else kept

    def drop(self, values: Iterable[Value]) -> None:
        for value in values:
            self._tensors.pop(value, None)
            self._kept.pop(value, None)

    def pop(self, value: Value) -> Kept:
        """The value without its graph."""
        del self._tensors[value]
        return self._kept.pop(value)


class Needs:
    """What the parts of a rank's stages need and give, of one segment of one batch: `Work`'s answers, asked once."""

    def __init__(self, work: Work, here: Work, dtype: torch.dtype) -> None:
        """`work`: of all processes that are one rank together; `here`: of this one."""
        self.work, self.here, self.dtype = work, here, dtype
        self._forward: dict[tuple[Part, bool], int] = {}
        self._backward: dict[Part, int] = {}
        self._made: dict[Part, list[tuple[torch.dtype, tuple[int, ...]]]] = {}

    def forward_bytes(self, part: Part, graph: bool) -> int:
        """Workspace of a part's forward."""
        key = part, graph
        if key not in self._forward:
            self._forward[key] = self._share(self.work.forward_workspace(part, graph))
        return self._forward[key]

    def backward_bytes(self, chunk: Chunk, place: int, splits: bool) -> int:
        """Workspace of a part's backward, and the gradients that wait in the chunk when it begins.

        0 where it cannot be the chunk's most: the backward of a part behind it, which comes before, needs no less while no less is
        kept. What is kept grows only in backwards that keep gradients: of linear layers, where the chunk `splits` into I and W,
        and of the keys and values of earlier segments.
        """
        part = chunk.parts[place]
        if part not in self._backward:
            most = 0
            for at, each in reversed(list(enumerate(chunk.parts))):
                nbytes = self._share(chunk.backward_bytes(at, self.work))
                self._backward[each] = nbytes if nbytes > most else 0
                most = 0 if self._keeps_gradients(each, splits) else max(most, nbytes)
        return self._backward[part]

    def _keeps_gradients(self, part: Part, splits: bool) -> bool:
        cut = len(self.work.batch.segment_lengths) > 1
        inside = [inner.about for inner in part.about.inside(part)]
        return any((splits and kind.splits) or (cut and kind.attends) for kind in inside)

    def check(
        self, part: Part, module: torch.nn.Module, made: Collection[Tensor], losses: tuple[int, ...] = ()
    ) -> None:
        """Raise ConfigError for values of another number, shape or precision than messages will have.

        `losses`: the shape of a loss that is not yet a sum, where it need not be one.
        """
        expected = self._made.get(part)
        if expected is None:
            expected = self._made[part] = [(self._dtype(value), self._shape(value)) for value in part.makes]
        if len(made) != len(expected):
            raise ConfigError(
                f"{part}: {type(module).__name__} gave {len(made)} tensors; give {self._told(part)}, {len(expected)} in all"
            )
        for value, tensor, (dtype, shape) in zip(part.makes, made, expected, strict=True):
            if tensor.dtype is dtype and tensor.shape == shape:
                continue
            if (
                value == loss_of(self.work.shape.layers)
                and tensor.shape in ((), losses)
                and tensor.dtype.is_floating_point
            ):
                continue
            raise ConfigError(
                f"{part}: {type(module).__name__} gave {value.name} as {_name(tensor.dtype)} {list(tensor.shape)}; "
                f"give it as {_name(dtype)} {list(shape)}"
            )

    def _share(self, nbytes: int) -> int:
        return nbytes // self.work.keeping.processes

    def _dtype(self, value: Value) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32) if is_wide(value.name) else self.dtype

    def _shape(self, value: Value) -> tuple[int, ...]:
        work = self.here
        return work.shape.value_shape(value, work.batch, work.segment)

    @staticmethod
    def _told(part: Part) -> str:
        return ", ".join(value.name for value in part.makes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
