"""Buffers: what modules hold beside parameters: tables, masks, running statistics. Each keeps its own precision.

    owner      its own            a step begins: are travelling buffers what was sent last? if not, they are sent anew
    visitor    the owner's        a step ends:   has a forward changed any?

A changed buffer is exact where one rank runs the part, and runs it once. Elsewhere it is refused, by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part
from helixpipe.runtime.mesh import Mesh
from helixpipe.runtime.modules import Modules
from helixpipe.runtime.watch import Watch

Key = tuple[Part, str]
"""A part and a buffer's place in its module."""
Print = tuple[torch.Size, torch.dtype, int]
# numbers at a time
PIECE = 2**20


class Buffers:
    """Of the modules of one rank. `recompute`: the policy under which it trains."""

    def __init__(self, modules: Modules, mesh: Mesh, watch: Watch, recompute: str) -> None:
        self._modules, self._mesh, self._watch, self._recompute = modules, mesh, watch, recompute
        stages = modules.schedule.stages
        self._ranks = {part: modules.ranks_with(s) for s, stage in enumerate(stages) for part in stage.parts}
        self._travel = any(len(self._ranks[part]) > 1 for part in modules.with_buffers)  # the same on every rank
        self._sent: dict[Key, Print] = {}
        self._before: dict[Key, Print] = {}
        self._fault = ""

    def persistent(self) -> dict[str, Tensor]:
        """Those of the parts that this rank owns which belong into a checkpoint, by full name."""
        return {
            self._modules.shape.parameter_name(part, place): buffer
            for part, module in self._modules.owned.items()
            for place, buffer in module.named_buffers()
            if _is_persistent(module, place)
        }

    def begin(self) -> None:
        """A step begins. Collective where any travel: where those of some rank are not what was sent last, owners send anew."""
        if self._travel:
            stale = self._prints(self._travelling) != self._sent
            if any(row[0] for row in self._mesh.gathered([stale], self._watch)):
                with self._watch.together():
                    for stage in range(len(self._modules.schedule.stages)):
                        self._share(stage)
                self._sent = self._prints(self._travelling)
        self._before = self._prints(self._modules.running)

    def end(self, training: bool) -> int:
        """A step ends: 0 when it changed none here, 1 when it did, 2 when it was not exact for that."""
        now = self._prints(self._modules.running)
        changed = [key for key in {**self._before, **now} if self._before.get(key) != now.get(key)]
        self._fault = next(filter(None, (self._why_not(*key, training) for key in changed)), "")
        if not self._fault and not self._travel:
            self._fault = next((self._came_late(*key) for key in now if len(self._ranks[key[0]]) > 1), "")
        return 2 if self._fault else bool(changed)

    def settle(self, ends: Collection[float]) -> None:
        """What `end` said on all ranks. Raises ConfigError on all; collective where some were changed.

        Replicas have seen other tokens each: all take what the first one has.
        """
        if 2 in ends:
            said = self._mesh.told(self._fault)  # by all, whoever has a fault of its own
            raise ConfigError(self._fault or next(filter(None, said)))
        if 1 in ends and (copies := self._mesh.copies) is not None:
            box = [self._values(self._modules.running)]
            with self._watch.together():
                dist.broadcast_object_list(box, group=copies, group_src=0)
            self._fill(box[0])

    def _share(self, stage: int) -> None:
        """Send the owner's to the ranks that a stage visits."""
        owner, *visitors = self._modules.ranks_with(stage)
        line = self._mesh.group("pp")
        for visitor in visitors:
            if self._modules.rank == owner:
                mine = self._values(self._modules.schedule.stages[stage].parts)
                dist.send_object_list([mine], group=line, group_dst=visitor)
            elif self._modules.rank == visitor:
                box: list[dict[Key, Tensor]] = [{}]
                dist.recv_object_list(box, group=line, group_src=owner)
                self._fill(box[0])

    def _why_not(self, part: Part, place: str, training: bool) -> str:
        """Why a step that changes a buffer is not exact, and what to do; "" where it is."""
        name, ranks = self._modules.shape.parameter_name(part, place), self._ranks[part]
        if len(ranks) > 1:
            return (
                f"{name}: forwards of {part} change it, and ranks {', '.join(map(str, sorted(ranks)))} each have one; "
                "keep the part on one rank, or its module in eval mode"
            )
        if training and self._recompute != "none":
            return (
                f"{name}: forwards of {part} change it, and recompute '{self._recompute}' would change it twice; "
                "use recompute 'none', or keep its module in eval mode"
            )
        return ""

    def _came_late(self, part: Part, place: str) -> str:
        name = self._modules.shape.parameter_name(part, place)
        return f"{name}: a buffer that {part} got after the pipeline was made, and would not travel; register it before"

    @property
    def _travelling(self) -> list[Part]:
        return [part for part, ranks in self._ranks.items() if len(ranks) > 1 and self._modules.rank in ranks]

    def _all(self, parts: Iterable[Part]) -> dict[Key, Tensor]:
        modules = self._modules.owned | self._modules.running
        return {(part, place): buffer for part in parts for place, buffer in modules[part].named_buffers()}

    def _values(self, parts: Iterable[Part]) -> dict[Key, Tensor]:
        return {key: buffer.detach().cpu() for key, buffer in self._all(parts).items()}

    def _fill(self, values: dict[Key, Tensor]) -> None:
        for (part, place), buffer in self._all({part for part, _ in values}).items():
            buffer.data = values[part, place].to(buffer.device)

    def _prints(self, parts: Iterable[Part]) -> dict[Key, Print]:
        buffers = self._all(parts)
        marks = [fingerprint(buffer) for buffer in buffers.values()]
        on_device = [mark for mark in marks if isinstance(mark, Tensor)]
        read = iter(torch.stack(on_device).tolist() if on_device else ())  # all at once: a device is waited for
        found = (next(read) if isinstance(mark, Tensor) else mark for mark in marks)
        each = zip(buffers.items(), found, strict=True)
        return {key: (buffer.shape, buffer.dtype, mark) for (key, buffer), mark in each}


def fingerprint(tensor: Tensor) -> int | Tensor:
    """A number of all its bits and where they are: torch's own count of writes misses those of a batch norm."""
    if tensor.layout is not torch.strided or type(tensor) is not Tensor:
        return tensor._version
    bits = tensor.detach().reshape(-1).view(torch.uint8)
    bits = bits.clone() if bits.storage_offset() % 8 else bits
    whole = len(bits) // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in (*bits[:whole].view(torch.int64).split(PIECE), bits[whole:].long()):
        odd = torch.arange(len(piece), device=tensor.device) * 2 + 1
        total = total * 1_000_003 + (piece * odd).sum()  # wraps around
    return total


def _is_persistent(module: nn.Module, place: str) -> bool:
    path, _, leaf = place.rpartition(".")
    return leaf not in module.get_submodule(path)._non_persistent_buffers_set
