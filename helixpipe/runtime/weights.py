"""Weights: the parameters on one rank.

    masters   parameters this rank owns, float32 or wider: what the optimizer sees; frozen ones in the run's precision
    working   what modules compute with: the master itself when the precision is the same, else a copy made
              anew each step; on a rank where the stage visits, what came from the owner this step

A module keeps its own Parameter objects wherever that can be, so that whoever holds one holds what is trained.
Gradients collect in the masters' precision. Those of a visiting stage go home as one message. What visits is on the
ledger for as long as it is here, and its gradients are; what is owned stands, and is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from helixpipe.model.linear import add_product
from helixpipe.model.wide import add_wide, adds_wide
from helixpipe.runtime.ledger import Kept, Ledger
from helixpipe.runtime.modules import Modules, Named


class Weights:
    """Of the parts that this rank owns or runs."""

    def __init__(self, modules: Modules) -> None:
        self.dtype = modules.dtype
        self.master_dtype = torch.promote_types(self.dtype, torch.float32)
        self.adds_wide = adds_wide(modules.device, self.dtype)
        """Whether products of linear layers are added to gradients in the masters' precision, and never rounded before."""
        self.modules = modules.running
        self.masters: dict[str, nn.Parameter] = {}
        self._found = modules
        self._working: dict[str, nn.Parameter] = {}
        self._collected: dict[str, Tensor] = {}  # gradients of working copies, in the masters' precision
        self.ledger = Ledger(self.is_parameter)
        self._guests: dict[str, Kept] = {}  # weights that visit
        self._leaving: dict[str, Kept] = {}  # and their gradients
        self._visits: Counter[str] = Counter()  # stages here that a visiting weight came for and that need it still
        self._used: set[str] = set()  # parameters that travel and had a gradient here this step
        self._storages: set[int] = set()
        for part, named in modules.parameters.items():
            for each in named:
                self._adopt(each, part in modules.running, modules.shape.trains(each.name))
                if part in modules.running:
                    for place in each.places:
                        _assign(modules.running[part], place, self._working[each.name])
        self._names = {id(working): name for name, working in self._working.items()}
        self._note_storages()

    def _adopt(self, named: Named, runs: bool, trains: bool) -> None:
        name, own = named.name, named.parameter
        _let_go(own)
        own.requires_grad_(trains).grad = None
        narrow = self.dtype if own.is_floating_point() else own.dtype
        if named.owned and name not in self.masters:
            kept = self.master_dtype if trains else narrow
            if kept == narrow or not runs:
                own.data = own.data.to(kept)
                self.masters[name] = own
            else:
                self.masters[name] = nn.Parameter(own.detach().to(kept))
        if not runs or name in self._working:
            return
        master = self.masters.get(name)
        if master is not None and master.dtype == narrow:
            self._working[name] = master
        else:
            own.data = _nothing(own, narrow)
            self._working[name] = own
        if trains and (self._working[name] is not master or name in self._found.travelling):
            self._working[name].register_post_accumulate_grad_hook(_Hook(self, name))

    def came(self, name: str, working: nn.Parameter) -> None:
        """A gradient was added to a parameter. That of a copy is put to what was collected, in the masters' precision."""
        self._used.add(name)
        if working is self.masters.get(name) or working.grad is None:
            return  # put off: autograd calls this with nothing to add
        if name in self._collected:
            self._collected[name].add_(working.grad)
        else:
            self._collect(name, working.grad.to(self.master_dtype))
        working.grad = None

    @torch.no_grad()
    def multiply_in(self, weight: nn.Parameter, x: Tensor, grad: Tensor) -> None:
        """Add the weight gradient that a linear layer had put off; where products are added wide, any of its."""
        name = self._names[id(weight)]
        if not self.adds_wide:
            add_product(weight, x, grad)
            self.came(name, weight)
            return
        self._used.add(name)
        if name not in self._collected:
            self._collect(name, torch.zeros(weight.shape, dtype=self.master_dtype, device=weight.device))
        add_wide(self._collected[name], x, grad)

    def _collect(self, name: str, gradient: Tensor) -> None:
        self._collected[name] = gradient
        if name in self._guests:
            self._leaving[name] = self.ledger.keep(gradient)

    @torch.no_grad()
    def begin(self) -> None:
        """Start of a step: working copies of what this rank owns."""
        for name, working in self._working.items():
            if name in self.masters and working is not self.masters[name]:
                working.data = self.masters[name].to(self.dtype)
        self._used.clear()
        self._note_storages()

    def outgoing(self, names: Sequence[str]) -> list[Tensor]:
        """Weights to send to a rank where a stage visits."""
        return [self.masters[name].detach().to(self.dtype) for name in self._here(names)]

    def arrive(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Weights came from their owner for a stage; they stay until the gradients of the last that shares them leave."""
        for name, tensor in zip(self._here(names), tensors, strict=True):
            self._visits[name] += 1
            if self._visits[name] == 1:
                self._guests[name] = self.ledger.keep(tensor)
                self._swap(self._working[name], tensor)

    def pack(self, names: Sequence[str]) -> None:
        """These leave before the next action: their gradients are in transit from here on."""
        for name in self._here(names):
            if name in self._leaving:
                self._leaving[name] = self.ledger.carry(self._collected[name])
            if self._visits[name] == 1:
                self._guests.pop(name, None)

    def leave(self, names: Sequence[str]) -> list[Tensor]:
        """Gradients to send home; the weights they are of are let go, unless another stage shares them."""
        gradients = []
        for name in self._here(names):
            working = self._working[name]
            gradient = self._collected.pop(name, None)
            self._leaving.pop(name, None)
            gradients.append(torch.zeros_like(working, dtype=self.master_dtype) if gradient is None else gradient)
            self._visits[name] -= 1
            if not self._visits[name]:
                self._guests.pop(name, None)
                self._swap(working, _nothing(working, self.dtype))
        return gradients

    @torch.no_grad()
    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Gradients came home."""
        for name, gradient in zip(self._here(names), gradients, strict=True):
            self._add(self.masters[name], gradient)

    @torch.no_grad()
    def end(self) -> None:
        """End of a step: what was collected goes to the masters; what visited is let go."""
        for name, gradient in self._collected.items():
            self._add(self.masters[name], gradient)
        for each in (self._collected, self._visits, self._guests, self._leaving):
            each.clear()
        for name, working in self._working.items():
            if name not in self.masters:
                self._swap(working, _nothing(working, self.dtype))

    def bare(self) -> set[str]:
        """The masters of travelling weights that have no gradient now."""
        return {name for name in self._found.travelling if name in self.masters and self.masters[name].grad is None}

    def used(self, names: Sequence[str]) -> list[bool]:
        """Whether each of these had a gradient on this rank."""
        return [name in self._used for name in self._here(names)]

    def settle(self, bare: Collection[str], used: Collection[str]) -> None:
        """Of those that were `bare`, what no rank used has no gradient, though zeros came home: plain autograd gives none either."""
        for name in set(bare) - set(self._here(used)):
            self.masters[name].grad = None

    def is_parameter(self, pointer: int) -> bool:
        """Whether a storage is a weight or a buffer rather than an activation."""
        return pointer in self._storages

    def _here(self, names: Collection[str]) -> list[str]:
        """As they are called here, where a module has one parameter under two names."""
        return [self._found.aliases.get(name, name) for name in names]

    def _add(self, master: nn.Parameter, gradient: Tensor) -> None:
        if master.grad is None:
            master.grad = gradient.to(self.master_dtype)
        else:
            master.grad.add_(gradient)

    def _swap(self, working: nn.Parameter, tensor: Tensor) -> None:
        """The next tensor at the old address may be an activation, which counts."""
        self._storages.discard(working.untyped_storage().data_ptr())
        working.data = tensor
        self._storages.add(tensor.untyped_storage().data_ptr())

    def _note_storages(self) -> None:
        buffers = [buffer for module in self.modules.values() for buffer in module.buffers()]
        self._storages = {t.untyped_storage().data_ptr() for t in (*self._working.values(), *buffers)}


class _Hook:
    """What autograd calls when it has added a parameter's gradient."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.weights, self.name = weights, name

    def __call__(self, working: nn.Parameter) -> None:
        self.weights.came(self.name, working)


def _let_go(parameter: nn.Parameter) -> None:
    """A pipeline that had this module before has it no more."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
        del hooks[key]


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The shape of a parameter whose values are elsewhere: one element, whatever the size."""
    return torch.empty(1, dtype=dtype, device=like.device).expand(like.shape)


def _assign(module: nn.Module, place: str, parameter: nn.Parameter) -> None:
    *path, leaf = place.split(".")
    for step in path:
        module = getattr(module, step)
    if getattr(module, leaf) is not parameter:
        setattr(module, leaf, parameter)
