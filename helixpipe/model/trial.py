"""Trial: what somebody's module makes, costs and keeps, found out by running it on tensors without data.

    FLOPs       of the operations in torch's own registry, forward and backward; causal attention is half of full
    moved       elements that all other operations read and write
    bytes       storages that the graph saves, and those that live beside them at the fullest moment

The tensors are torch's fake ones: sizes and no values, so that a trial of any length takes no memory and no arithmetic. They
pose as CPU tensors, whatever the machine: every rank finds out the same. A module that needs values (or an operation that
knows no fake tensors) is run on real ones, where its parameters are, at the size that is asked for.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from helixpipe.errors import ConfigError

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
"""Bytes of an element -> what a trial computes in."""


class Given(NamedTuple):
    """A tensor to hand in: its shape, and whether it is an activation rather than tokens or targets."""

    shape: tuple[int, ...]
    is_value: bool


@dataclass(frozen=True)
class Figures:
    """Of one run of one module on tensors of given shapes."""

    made: tuple[int, ...]
    """The shape of its output."""
    forward_flops: float
    backward_flops: float
    moved_elements: float
    """By its forward."""
    saves_input: bool
    saves_output: bool
    inside_bytes: int
    """Saved beside these."""
    plain_workspace: int
    """Of a forward without a graph: bytes at most beyond inputs and outputs."""
    graph_workspace: int
    """The same with one, beyond what it saves."""
    backward_workspace: int
    """Beyond what is saved and the gradient of the output."""


class Trials:
    """Figures of some modules, which are left as they are. `names` tell of them in errors."""

    def __init__(self, modules: Sequence[nn.Module], names: Sequence[str]) -> None:
        self.modules, self.names = modules, names
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._copies: dict[tuple[int, torch.dtype], nn.Module] = {}
        self._figures: dict[tuple[int, tuple[Given, ...], int], Figures] = {}
        self._needs_values: set[int] = set()

    def figures(self, number: int, given: tuple[Given, ...], element_bytes: int) -> Figures:
        """Of a module by its number. Raises ConfigError for one that fails, or gives no tensor of floats."""
        key = number, given, element_bytes
        if key not in self._figures:
            self._figures[key] = self._found(number, given, DTYPES[element_bytes])
        return self._figures[key]

    def _found(self, number: int, given: tuple[Given, ...], dtype: torch.dtype) -> Figures:
        name = self.names[number]
        if number not in self._needs_values:
            try:
                with self._fake:
                    return _measured(self._faked(number, dtype), given, dtype, torch.device("cpu"), name)
            except ConfigError:
                raise
            except Exception:  # whatever it is, a real run shows whether it is the module's own
                self._needs_values.add(number)
        try:
            with own_randomness(device_of(self.modules[number])):
                module = copy.deepcopy(self.modules[number]).to(dtype)
                return _measured(module, given, dtype, device_of(module), name)
        except ConfigError:
            raise
        except Exception as error:
            raise failed(name, given, dtype, error) from error

    def _faked(self, number: int, dtype: torch.dtype) -> nn.Module:
        """A copy whose parameters and buffers are fake, also where the module holds them in lists of its own."""
        key = number, dtype
        if key not in self._copies:
            module = self.modules[number]
            memo: dict[int, Tensor] = {}
            for parameter in module.parameters():
                fake = torch.empty(parameter.shape, dtype=_as(dtype, parameter), device="cpu")
                memo[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
            for buffer in module.buffers():
                memo[id(buffer)] = torch.empty(buffer.shape, dtype=_as(dtype, buffer), device="cpu")
            self._copies[key] = made = copy.deepcopy(module, memo)
            for inner in made.modules():
                if isinstance(inner, nn.RNNBase):
                    inner.forward = partial(_at_once, inner)
        return self._copies[key]


class Meter(TorchDispatchMode):
    """Within it: FLOPs, elements moved, and bytes of storages that were made and live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.moved = 0.0
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        self._known.update(map(storage_of, given))  # what was there before is nobody's doing here
        out = func(*args, **kwargs)
        made = _tensors(out)
        for tensor in made:
            self._hold(tensor)
        formula = ATTENTION.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif func._schema.is_mutable or not {*map(storage_of, made)} <= {*map(storage_of, given)}:  # no view
            self.moved += sum(tensor.numel() for tensor in (*given, *made))
        return out

    def _hold(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if key not in self._known:
            self._known.add(key)
            storage = tensor.untyped_storage()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._let_go, key, storage.nbytes())

    def _let_go(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= nbytes


def storage_of(tensor: Tensor) -> int:
    """Which storage it lies in: fake ones have no address."""
    return int(tensor.untyped_storage()._cdata)


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Within it, what is drawn on the CPU and on this device changes nothing for the caller."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def failed(name: str, given: Sequence[Given], dtype: torch.dtype, error: Exception) -> ConfigError:
    """What to raise for a module that does not run."""
    shapes = " and ".join(f"{list(each.shape)}" for each in given)
    line = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"{name} failed on {shapes} in {str(dtype).removeprefix('torch.')}: {line}")


def given_tensors(given: Sequence[Given], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Values at random; tokens and targets that any vocabulary has."""
    return [
        torch.randn(each.shape, dtype=dtype, device=device)
        if each.is_value
        else torch.zeros(each.shape, dtype=torch.int64, device=device)
        for each in given
    ]


def _measured(
    module: nn.Module, given: Sequence[Given], dtype: torch.dtype, device: torch.device, name: str
) -> Figures:
    tensors = given_tensors(given, dtype, device)
    with torch.no_grad(), Meter() as plain:
        out = _checked(module(*tensors), name)
    plain_workspace = plain.peak_bytes - plain.live_bytes
    del out

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # as in all micro-batches but the first
    leaves = [tensor.requires_grad_() if each.is_value else tensor for each, tensor in zip(given, tensors, strict=True)]
    here = {storage_of(tensor) for tensor in (*leaves, *module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.enable_grad(), Meter() as meter:
        with saved_tensors_hooks(keep, _itself):
            out = _checked(module(*leaves), name)
        forward_flops, moved = meter.flops, meter.moved
        graph_workspace = meter.peak_bytes - meter.live_bytes
        made, output = tuple(out.shape), storage_of(out)
        backward_workspace = 0
        if out.requires_grad:
            edge, gradient = get_gradient_edge(out), torch.ones_like(out)
            del out
            before = meter.peak_bytes = meter.live_bytes
            torch.autograd.backward([edge], [gradient])
            backward_workspace = meter.peak_bytes - before
    for parameter in trained:
        parameter.grad = None
    return Figures(
        made,
        forward_flops,
        meter.flops - forward_flops,
        moved,
        any(each.is_value and storage_of(leaf) in saved for each, leaf in zip(given, leaves, strict=True)),
        output in saved,
        sum(nbytes for storage, nbytes in saved.items() if storage not in here | {output}),
        plain_workspace,
        graph_workspace,
        backward_workspace,
    )


def _checked(out: object, name: str) -> Tensor:
    if isinstance(out, Tensor) and out.is_floating_point():
        return out
    what = type(out).__name__ + (f" of {len(out)}" if isinstance(out, tuple | list) else "")
    if isinstance(out, Tensor):
        what = str(out.dtype).removeprefix("torch.")
    raise ConfigError(f"{name} gave {what}; give one tensor of floats: wrap it in a module that returns that alone")


def _as(dtype: torch.dtype, tensor: Tensor) -> torch.dtype:
    """Floats are of the run's precision, all else is what it is."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _at_once(rnn: nn.RNNBase, x: Tensor, state: object = None) -> tuple[Tensor, object]:
    """As many FLOPs and elements as a recurrent layer's steps have together: one by one they would be tried for minutes."""
    out, ways = x, 2 if rnn.bidirectional else 1
    weights = [dict(zip(map(_kind, names), map(rnn.get_parameter, names), strict=True)) for names in rnn._all_weights]
    for first in range(0, len(weights), ways):
        made = []
        for own in weights[first : first + ways]:
            gates = F.linear(out, own["weight_ih"], own.get("bias_ih"))
            before = gates[..., : own["weight_hh"].shape[1]]
            gates = gates + F.linear(before, own["weight_hh"], own.get("bias_hh"))
            *others, last = gates.chunk(gates.shape[-1] // rnn.hidden_size, -1)
            h = torch.tanh(last)
            for gate in others:
                h = h * torch.sigmoid(gate)
            made.append(h if "weight_hr" not in own else F.linear(h, own["weight_hr"]))
        out = torch.cat(made, -1)
    last_state = out.new_zeros(len(weights), x.shape[0 if rnn.batch_first else 1], made[-1].shape[-1])
    return out, (last_state, last_state) if isinstance(rnn, nn.LSTM) else last_state


def _kind(name: str) -> str:
    """`weight_ih` of weight_ih_l0_reverse."""
    return "_".join(name.split("_")[:2])


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **more: Any) -> float:
    full = float(sdpa_flop_count(q.shape, k.shape, v.shape))
    return full / 2 if causal else full


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, causal: bool, **more: Any
) -> float:
    full = float(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))
    return full / 2 if causal else full


ATTENTION: dict[Any, Callable[..., float]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's registry lacks: the CPU's fused attention."""
