"""Transport: messages over torch.distributed, with one meaning on gloo and NCCL.

Every rank posts its messages in the program's order, so no tags are needed where there are none; gloo
gets them all the same. A send's tensors are let go as soon as it is complete; a receive's buffer is made
when it is posted and belongs to whoever waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.errors import RankError
from helixpipe.parts.kind import is_wide
from helixpipe.predict.hardware import Communicators
from helixpipe.runtime.channels import Channels
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.parcel import is_parcel, packed, unpacked
from helixpipe.runtime.sends import DeviceSends, HostSends, InFlight, SendError, Work
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.program import Kind, Message
from helixpipe.sequence.wire import wire_of

# tensors in one message at most, so that each has a tag of its own
WIDTH = 64


class Transport:
    """One rank's end. `dtype` is that of values and weights, `gradient_dtype` that of weight gradients and wide values."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        timeout_s: float,
        watch: Watch,
        ledger: Ledger,
        communicators: Communicators = "direction",
        tags: bool | None = None,
    ) -> None:
        """`communicators`: of a backend without tags, see `channels`. `tags`: whether the backend has any; None: gloo has."""
        self.group, self.device = group, device
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        self.timeout_s, self.watch, self.ledger = timeout_s, watch, ledger
        self._timeout = timedelta(seconds=timeout_s)
        # gloo moves host memory only: CUDA tensors are staged through it
        self._wire = wire_of(group, device)
        self.host, self._staged = self._wire.type == "cpu", self._wire != self.device
        self.tags = self.host if tags is None else tags
        self._channels = None if group is None else Channels(group, communicators, timeout_s)
        self._sends = HostSends(timeout_s) if self.host else DeviceSends()
        self._receives: dict[int, InFlight] = {}

    def meet(self, messages: Iterable[Message], lines: Sequence[Sequence[int]] = ()) -> None:
        """Let every pair that will have messages say one word, in one order. Collective.

        `lines`: of every pipeline of the run its ranks, to make channels in; none: messages go through the pipeline's group.

        NCCL makes a communicator at its first message, and both ranks stand still until the other comes to it.
        """
        channels, word = _known(self._channels), torch.zeros(1, device=self._wire)
        rank = dist.get_rank(self.group)
        for src, dst in channels.ways((m.src, m.dst) for m in messages):
            peer = src + dst - rank if rank in (src, dst) else -1
            with self._named(f"the first word from rank {src} to rank {dst}", peer):
                channels.make((src, dst), lines)
                if peer >= 0:
                    self._complete(self._post(src, dst, [word], 0))

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        if self._is_parcel(message):
            tensors = [packed(tensors)]
        if self._staged:
            tensors = [tensor.to(self._wire) for tensor in tensors]
        held = [self.ledger.carry(tensor.contiguous()) for tensor in tensors]
        with self._named(message, message.dst):
            works = self._post(message.src, message.dst, [each.tensor for each in held], message.number)
            self._sends.hold(InFlight(message, works, held))

    def receive(self, message: Message) -> None:
        each = list(zip(message.shapes, self._dtypes(message), strict=True))
        if self._is_parcel(message):
            each = [((message.elements,), each[0][1])]
        held = [self.ledger.carry(torch.empty(shape, dtype=dtype, device=self._wire)) for shape, dtype in each]
        with self._named(message, message.src):
            works = self._post(message.src, message.dst, [each.tensor for each in held], message.number)
        self._receives[message.number] = InFlight(message, works, held)

    def wait(self, message: Message) -> list[Tensor]:
        """The tensors of a message, once they are here; RankError when they do not come in time."""
        flight = self._receives.pop(message.number)
        with self._named(message, message.src):
            self._complete(flight.works)
        tensors = [each.tensor for each in flight.held]
        if self._staged:
            tensors = [tensor.to(self.device) for tensor in tensors]
        return unpacked(tensors[0], message.shapes) if self._is_parcel(message) else tensors

    def finish(self) -> None:
        """Wait for every send of the step."""
        with self._named(None, -1):
            self._sends.finish()

    def close(self) -> None:
        self._sends.close()

    def _complete(self, works: Sequence[Work]) -> None:
        for work in works:
            # NCCL orders the stream and returns at once; its own watchdog keeps the time
            work.wait(self._timeout) if self.host else work.wait()

    def _post(self, src: int, dst: int, tensors: Sequence[Tensor], number: int) -> list[Work]:
        """Start to send a message's tensors, or to receive them where this rank is `dst`; in one request where NCCL can."""
        channels = _known(self._channels)
        group, peer, is_own = channels.of(src, dst)
        # the group's own calls: what dist.isend does around them costs more than they do
        post = group.send if src == channels.rank else group.recv
        first, step = (number * WIDTH, 1) if self.tags else (0, 0)
        if self.host or not is_own:  # NCCL takes several at once only through a communicator of the whole group
            return [post([tensor], peer, first + step * i) for i, tensor in enumerate(tensors)]
        group._start_coalescing(self.device)
        for tensor in tensors:
            post([tensor], peer, 0)
        return [group._end_coalescing(self.device)]

    def _dtypes(self, message: Message) -> list[torch.dtype]:
        """Of each of its tensors."""
        if message.kind is Kind.WEIGHT_GRADIENTS:
            return [self.gradient_dtype] * len(message.names)
        if not message.wide_elements:
            return [self.dtype] * len(message.names)
        return [self.gradient_dtype if is_wide(name) else self.dtype for name in message.names]

    def _is_parcel(self, message: Message) -> bool:
        return len(message.shapes) > 1 and self.host and is_parcel(message, self._dtypes(message))

    def _named(self, message: Message | str | None, peer: int) -> _Named:
        return _Named(self, message, peer)


class _Named:
    """Whatever the backend says of a failure becomes who waited for what, from whom, and what that rank did."""

    __slots__ = ("_begun", "_message", "_peer", "_transport")

    def __init__(self, transport: Transport, message: Message | str | None, peer: int) -> None:
        self._transport, self._message, self._peer = transport, message, peer

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError | SendError):
            return  # none, or no other rank's doing
        watch, message, peer = self._transport.watch, self._message, self._peer
        if isinstance(error, SendError):
            message, peer = error.message, error.message.dst
        waited_s = time.monotonic() - self._begun
        late = waited_s >= self._transport.timeout_s - 1
        lost, told = "a rank", watch.others()
        if peer >= 0:
            other = watch.line[peer]
            lost, told = watch.names[other], watch.told(other)
        what = f"waited {waited_s:.0f} s" if late else f"lost {lost} while waiting"
        raise RankError(f"{watch.me}, at {watch.doing}, {what} for {message}; {told}") from error


def _known(channels: Channels | None) -> Channels:
    if channels is None:
        raise RuntimeError("a message, and this process is alone")
    return channels
