"""Tensor parallelism of a rank's parts, with norms, embedding and head on shards of the sequence (arXiv 2205.05198).

    x, n, y  [b, s/tp, h]        norm ── n ──gather──► q k v ── attention of heads/tp ── o ──scatter──► + x ── y
                                 norm ─────gather──► gate up: ffn/tp columns ── down ──scatter──► + y ── x'

A gather's backward is a scatter and the other way round, so each layer sends 4 of them forward and 4 backward, as
torch's ColwiseParallel, RowwiseParallel and SequenceParallel would. Those styles make DTensors; here parameters
stay plain tensors, because the runtime swaps their storage, sends them and puts off their gradients.

q, k, v, gate and up are divided by rows, o and down by columns. Embedding, head and norms are whole on every
rank, and their gradients are summed with those of cp and dp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from helixpipe.errors import ConfigError, RankError
from helixpipe.model.divided import TensorDivided
from helixpipe.parts.kind import maker
from helixpipe.parts.part import Part, Value
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.sequence.wire import wire_of


@dataclass(frozen=True)
class TensorShape(ModelShape):
    """What one of `tensor` ranks holds: heads and ffn divided, and the sequence where no matrix is."""

    tensor: int = 1

    @staticmethod
    def of(whole: ModelShape, tensor: int) -> TensorShape:
        """Raises ConfigError for a shape of someone's own, whose parts are not known here."""
        if type(whole) is not ModelShape:
            raise ConfigError(
                f"mesh.tp: {tensor}; the parts of {type(whole).__name__} cannot be divided, a ModelShape's can: use tp 1, "
                "and cp or dp in its place"
            )
        share = whole.tensor_share(tensor)
        return TensorShape(**{field.name: getattr(share, field.name) for field in fields(ModelShape)}, tensor=tensor)

    def value_shape(self, value: Value, batch: Batch, segment: int) -> tuple[int, ...]:
        if not (whole := super().value_shape(value, batch, segment)):
            return whole  # the loss
        b, s, *rest = whole
        return (b, s // self.tensor, *rest) if maker(value.name).over_tokens else (b, s, *rest)


class TensorParallel:
    """This rank's share of every part. `shape` is the whole model's."""

    def __init__(self, group: dist.ProcessGroup, shape: ModelShape) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.whole, self.local = shape, TensorShape.of(shape, self.ranks)
        self.cuts: dict[str, int] = {}
        """Full name of a parameter that is divided -> along which dimension; of the parts on this rank."""

    def divide(self, part: Part, module: nn.Module) -> None:
        """Leave this rank's share of a part's parameters, and let its modules gather and scatter.

        Raises ConfigError for a parameter to be cut that is not inside a module which does.
        """
        mine = self.local.parameters(part)
        for name, shape in self.whole.parameters(part).items():
            dim = next((d for d, (a, b) in enumerate(zip(shape, mine[name], strict=True)) if a != b), None)
            if dim is None:
                continue
            parameter = self._known(part, module, name, (shape, mine[name]))
            if parameter.shape == shape:  # else it was divided where it came from
                parameter.data = parameter.data.chunk(self.ranks, dim)[self.rank].clone()
            self.cuts[self.whole.parameter_name(part, name)] = dim
        for inner in module.modules():
            if isinstance(inner, TensorDivided):
                inner.divide(self.gather, self.scatter)

    def _known(self, part: Part, module: nn.Module, name: str, sizes: tuple[tuple[int, ...], ...]) -> nn.Parameter:
        """A parameter to be cut, or one of a size after it."""
        parameter = dict(module.named_parameters()).get(name)
        homes = [path and f"{path}." for path, inner in module.named_modules() if isinstance(inner, TensorDivided)]
        if parameter is None or parameter.shape not in sizes or not name.startswith(tuple(homes)):
            raise ConfigError(
                f"mesh.tp: {self.ranks}; {part} is {type(module).__name__}, whose {name} cannot be divided; "
                "use tp 1, or QKV, Proj and MLP of helixpipe.model in it"
            )
        return parameter

    def as_whole(self, name: str, mine: Tensor, line: DeviceMesh) -> Tensor:
        """This rank's tensor of a parameter as part of a DTensor over `line`, on the same memory; or itself."""
        from torch.distributed.tensor import DTensor, Shard  # slow to import, and only checkpoints need it

        if name not in self.cuts:
            return mine
        return DTensor.from_local(mine, line, [Shard(self.cuts[name])], run_check=False)

    def gather(self, x: Tensor) -> Tensor:
        """[b, s/tp, h] of every rank -> [b, s, h], the same on all."""
        gathered: Tensor = _Exchange.apply(x, self._gathered, self._scattered)  # type: ignore[no-untyped-call]
        return gathered

    def scatter(self, x: Tensor) -> Tensor:
        """[b, s, h], another on every rank -> this rank's [b, s/tp, h] of their sum."""
        scattered: Tensor = _Exchange.apply(x, self._scattered, self._gathered)  # type: ignore[no-untyped-call]
        return scattered

    def _gathered(self, x: Tensor) -> Tensor:
        wire = self._wire(x)
        pieces = wire.new_empty(self.ranks, *wire.shape)
        with self._named():
            # the group's own call: torch 2.13 warns of the older name for it, and older ones lack the newer
            self.group._allgather_base(pieces.flatten(0, 1), wire).wait()
        return pieces.movedim(0, 1).flatten(1, 2).to(x.device)  # no copy of one sequence

    def _scattered(self, x: Tensor) -> Tensor:
        pieces = self._wire(x.unflatten(1, (self.ranks, -1)).movedim(1, 0))
        total = torch.empty_like(pieces[0])
        with self._named():
            if pieces.device.type == "cpu":  # gloo's for one tensor would sum all of it on every rank
                dist.reduce_scatter(total, list(pieces), group=self.group)
            else:
                self.group._reduce_scatter_base(total, pieces.flatten(0, 1), dist.ReduceScatterOptions()).wait()
        return total.to(x.device)

    def _wire(self, x: Tensor) -> Tensor:
        """As the backend can send it."""
        return x.to(wire_of(self.group, x.device)).contiguous()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # no other rank's doing
        except RuntimeError as error:
            raise RankError(f"lost a rank that divides the same matrices (tp, {self.ranks} ranks)") from error


class _Exchange(torch.autograd.Function):
    """A collective, and the one that takes gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad), None, None
