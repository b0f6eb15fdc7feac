"""What a step's heap is made of at its peak: every tensor that is alive then, who made it, and who holds it.

Two steps under a dispatch mode, which sees every operation of forwards and backwards. The first finds the operation
during which the heap is fullest; the second stops at it and looks around:

    kept        what the ledger counts
    held        what only names in a frame of the stack, or attributes reached from one, hold: these are listed
    graph       what no Python name holds: gradients on their way through autograd, tensors inside of C++
    inside      what the operation itself takes while it runs, its result included
    no tensor   all else: messages in the backend, Python's own objects, kernels' lasting workspaces
"""

from __future__ import annotations

import gc
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import heap
from memory.measure import Case, Step, Steps
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from helixpipe.runtime.forked import run_forked
from helixpipe.runtime.ledger import Kept

Tensors = dict[tuple[str, str, str], int]
"""(kind, who made it, who holds it) -> bytes of all such."""
DEEP = 7  # attributes and elements between a name in a frame and a tensor


@dataclass
class Made:
    """A storage that came into being in the step."""

    weak: StorageWeakRef
    nbytes: int
    origin: str


@dataclass
class Anatomy:
    """Of one rank's peak, in bytes."""

    heap_bytes: int
    at: str
    inside_bytes: int
    tensors: Tensors

    @property
    def no_tensor_bytes(self) -> int:
        return self.heap_bytes - self.inside_bytes - sum(self.tensors.values())


@dataclass
class Watching(TorchDispatchMode):
    """Follows the heap from operation to operation; looks around at the operation numbered `stop`."""

    stop: int = -1
    before_bytes: int = 0
    count: int = 0
    peak_bytes: int = 0
    """The most over `before_bytes`; during which operation, and what that one took."""
    peak_at: int = -1
    inside_bytes: int = 0
    at: str = ""
    tensors: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Made] = {}

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.stop:
            self.at = f"{func} at {_place(sys._getframe(1))}, of {_shapes(args)}"
            self.tensors = self._around()
        if self.stop >= 0:
            self._know(args)
            result = func(*args, **(kwargs or {}))
            self._remember(func, result)
            return result
        before = heap.now_bytes()
        result = func(*args, **(kwargs or {}))
        if heap.peak_bytes() - self.before_bytes > self.peak_bytes:  # here, or since the last one ended
            self.peak_bytes, self.peak_at = heap.peak_bytes() - self.before_bytes, self.count
            self.inside_bytes = heap.peak_bytes() - before
        heap.reset()
        return result

    def _know(self, args: Any) -> None:
        """What an operation reads and none has made stood before the step."""
        for tensor in args:
            self._note(tensor, 0, "")

    def _remember(self, func: Any, result: Any) -> None:
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                origin = f"{func} {tuple(tensor.shape)} at {_place(sys._getframe(2))}"
                self._note(tensor, tensor.untyped_storage().nbytes(), origin)

    def _note(self, tensor: Any, nbytes: int, origin: str) -> None:
        """A tensor's storage, where it is new."""
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        known = self._seen.get(storage._cdata)
        if known is None or known.weak.expired():
            self._seen[storage._cdata] = Made(StorageWeakRef(storage), nbytes, origin)

    def _around(self) -> Tensors:
        alive = {cdata: made for cdata, made in self._seen.items() if made.nbytes and not made.weak.expired()}
        kept = {o.tensor.untyped_storage()._cdata for o in gc.get_objects() if isinstance(o, Kept)}
        holders = _holders(sys._getframe(2))
        found: Counter[tuple[str, str, str]] = Counter()
        for cdata, made in alive.items():
            names = "" if cdata in kept else ", ".join(sorted(holders.get(cdata, ())))
            kind = "kept" if cdata in kept else "held" if names else "graph"
            found[kind, made.origin, names] += made.nbytes
        return dict(found)


def watched(step: Callable[[], object]) -> Anatomy:
    """Runs it twice, beside the once that it should have run before."""
    first = _step(step, Watching())
    # the same operations run in the same order, whenever messages come
    second = _step(step, Watching(stop=first.peak_at))
    return Anatomy(first.peak_bytes, second.at, first.inside_bytes, second.tensors)


def _step(step: Callable[[], object], mode: Watching) -> Watching:
    gc.collect()
    heap.reset()
    mode.before_bytes = heap.now_bytes()
    with mode:
        step()
    return mode


def _place(frame: FrameType | None) -> str:
    """The innermost line of the package, and the function that runs it."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "helixpipe" in path.rpartition("/")[0] and "benchmarks" not in path:
            return f"{path.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"


def _shapes(args: Any) -> str:
    return " ".join(str(list(each.shape)) for each in args if isinstance(each, Tensor))


def _holders(frame: FrameType | None) -> dict[int, set[str]]:
    """Storage -> what holds it: the last frame and attributes on a way to it, from each name of each frame."""
    found: dict[int, set[str]] = {}
    while frame is not None:
        path = frame.f_code.co_filename
        if "helixpipe" in path.rpartition("/")[0] and "benchmarks" not in path:
            for name, value in frame.f_locals.items():
                for cdata, way in _reached(value, f"{frame.f_code.co_qualname}: {name}"):
                    found.setdefault(cdata, set()).add(way)
        frame = frame.f_back
    return found


def _reached(value: Any, name: str) -> Iterator[tuple[int, str]]:
    """Tensors reached from a value through containers and attributes of the package's objects."""
    waiting, seen = deque([(value, name, 0)]), set()
    while waiting:
        each, way, depth = waiting.popleft()
        if id(each) in seen or depth > DEEP:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.device.type == "cpu":
                yield each.untyped_storage()._cdata, way
            if each.is_leaf and each.grad is not None:
                waiting.append((each.grad, f"{way}.grad", depth + 1))
        elif isinstance(each, dict):
            waiting += [(inner, way, depth + 1) for inner in each.values()]
        elif isinstance(each, (list, tuple, set, deque)):
            waiting += [(inner, way, depth + 1) for inner in each]
        elif type(each).__module__.startswith("helixpipe.runtime"):
            inside = getattr(each, "__dict__", None) or {
                n: getattr(each, n) for n in getattr(type(each), "__slots__", ())
            }
            waiting += [(inner, f"{type(each).__name__}.{n}", depth + 1) for n, inner in inside.items()]


@dataclass
class Anatomies(Steps):
    """The job of local ranks: of each case, what its peak is made of."""

    def measure(self, step: Step) -> Any:
        return watched(step.take)


def anatomies(case: Case, limit_s: float) -> list[Anatomy]:
    """Of each rank."""
    with heap.metered():
        return [found for (found,) in run_forked(Anatomies((case,), limit_s))]


def told(case: Case, found: Sequence[Anatomy]) -> Iterator[str]:
    """The lines of a case, in units of b*s*h elements; what is less than a fiftieth of one is left out."""
    unit = case.length * case.hidden * case.keeping.element_bytes
    for rank, each in enumerate(found):
        sums: Counter[str] = Counter()
        for (kind, _, _), nbytes in each.tensors.items():
            sums[kind] += nbytes
        parts = {**sums, "inside": each.inside_bytes, "no tensor": each.no_tensor_bytes}
        yield f"{case}; rank {rank}: {each.heap_bytes / unit:.2f} units of {unit / 2**20:g} MiB, during {each.at}"
        yield "    " + ", ".join(f"{name} {nbytes / unit:.2f}" for name, nbytes in parts.items())
        for (kind, origin, holders), nbytes in sorted(each.tensors.items(), key=lambda item: (item[0][0], -item[1])):
            if nbytes > unit / 50:
                yield f"    {kind:6}{nbytes / unit:7.2f}  {origin}" + (f"  <-  {holders}" if holders else "")
