"""Weights: the parameters on one rank.

    masters   parameters this rank owns, float32 or wider: what the optimizer sees
    working   what modules compute with: the master itself when the precision is the same, else a copy made
              anew each step; on a rank where the stage visits, what came from the owner this step

Gradients collect in the masters' precision. Those of a visiting stage go home as one message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helixpipe.model.attn import Attention
from helixpipe.model.decoder import Model
from helixpipe.model.kernels import check_head_dim
from helixpipe.model.linear import add_product
from helixpipe.parts.part import Part
from helixpipe.runtime.tensor import TensorParallel
from helixpipe.schedule.program import parameter_owners
from helixpipe.schedule.schedule import Schedule


class Weights:
    """Asks the model for the parts this rank owns or runs, and for no others."""

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        tensor: TensorParallel | None = None,
    ) -> None:
        """`tensor`: of each part, this rank holds and computes its share."""
        self.device, self.dtype = device, dtype
        self.master_dtype = torch.promote_types(dtype, torch.float32)
        self.modules: dict[Part, nn.Module] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self._working: dict[str, nn.Parameter] = {}
        self._collected: dict[str, Tensor] = {}  # gradients of working copies, in the masters' precision
        self._visits: Counter[str] = Counter()  # stages here that a visiting weight came for and that need it still
        self._storages: set[int] = set()
        owners = parameter_owners(schedule, model.shape)
        for s, stage in enumerate(schedule.stages):
            runs, owns = rank in schedule.ranks_of[s], rank == schedule.owner(s)
            for part in stage.parts if runs or owns else ():
                module = model.part(part)
                if any(isinstance(inner, Attention) for inner in module.modules()):
                    check_head_dim(model.shape.head_dim, device, dtype)
                if tensor is not None:
                    tensor.divide(part, module)
                module = module.to(device)
                for local, parameter in list(module.named_parameters()):
                    name = model.shape.parameter_name(part, local)
                    owner = owners.get(name, schedule.owner(s))
                    self._adopt(name, parameter, owned=owner == rank, runs=runs)
                    if runs:
                        _assign(module, local, self._working[name])
                if runs:
                    self.modules[part] = module
        self._names = {id(working): name for name, working in self._working.items()}
        self._note_storages()

    def _adopt(self, name: str, parameter: nn.Parameter, owned: bool, runs: bool) -> None:
        if owned and name not in self.masters:
            self.masters[name] = nn.Parameter(parameter.detach().to(self.master_dtype))
        if not runs or name in self._working:
            return
        if owned and self.dtype == self.master_dtype:
            self._working[name] = self.masters[name]
            return
        working = nn.Parameter(_nothing(parameter, self.dtype))
        working.register_post_accumulate_grad_hook(lambda p, name=name: self._collect(name, p))
        self._working[name] = working

    def _collect(self, name: str, working: Tensor) -> None:
        """Add a working copy's fresh gradient to what was collected, in the masters' precision."""
        if working.grad is None:
            return  # put off: autograd calls this with nothing to add
        if name in self._collected:
            self._collected[name].add_(working.grad)
        else:
            self._collected[name] = working.grad.to(self.master_dtype)
        working.grad = None

    @torch.no_grad()
    def multiply_in(self, weight: nn.Parameter, x: Tensor, grad: Tensor) -> None:
        """Add the weight gradient that a linear layer had put off."""
        add_product(weight, x, grad)
        name = self._names[id(weight)]
        if weight is not self.masters.get(name):
            self._collect(name, weight)

    @torch.no_grad()
    def begin(self) -> None:
        """Start of a step: working copies of what this rank owns."""
        for name, working in self._working.items():
            if name in self.masters and working is not self.masters[name]:
                working.data = self.masters[name].to(self.dtype)
        self._note_storages()

    def outgoing(self, names: Sequence[str]) -> list[Tensor]:
        """Weights to send to a rank where a stage visits."""
        return [self.masters[name].detach().to(self.dtype) for name in names]

    def arrive(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Weights came from their owner for a stage; they stay until the gradients of the last that shares them leave."""
        for name, tensor in zip(names, tensors, strict=True):
            self._visits[name] += 1
            if self._visits[name] == 1:
                self._working[name].data = tensor
                self._storages.add(tensor.untyped_storage().data_ptr())

    def leave(self, names: Sequence[str]) -> list[Tensor]:
        """Gradients to send home; the weights they are of are let go, unless another stage shares them."""
        gradients = []
        for name in names:
            working = self._working[name]
            gradient = self._collected.pop(name, None)
            gradients.append(torch.zeros_like(working, dtype=self.master_dtype) if gradient is None else gradient)
            self._visits[name] -= 1
            if not self._visits[name]:
                # the next tensor at this address may be an activation
                self._storages.discard(working.untyped_storage().data_ptr())
                working.data = _nothing(working, self.dtype)
        return gradients

    @torch.no_grad()
    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Gradients came home."""
        for name, gradient in zip(names, gradients, strict=True):
            self._add(self.masters[name], gradient)

    @torch.no_grad()
    def end(self) -> None:
        """End of a step: what was collected goes to the masters; what visited is let go."""
        for name, gradient in self._collected.items():
            self._add(self.masters[name], gradient)
        self._collected.clear()
        self._visits.clear()
        for name, working in self._working.items():
            if name not in self.masters:
                working.data = _nothing(working, self.dtype)

    def is_parameter(self, pointer: int) -> bool:
        """Whether a storage is a weight rather than an activation."""
        return pointer in self._storages

    def _add(self, master: nn.Parameter, gradient: Tensor) -> None:
        if master.grad is None:
            master.grad = gradient.to(self.master_dtype)
        else:
            master.grad.add_(gradient)

    def _note_storages(self) -> None:
        self._storages = {w.untyped_storage().data_ptr() for w in self._working.values()}


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The shape of a parameter whose values are elsewhere: one element, whatever the size."""
    return torch.empty(1, dtype=dtype, device=like.device).expand(like.shape)


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for step in path:
        module = getattr(module, step)
    setattr(module, leaf, parameter)
