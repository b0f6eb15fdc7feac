"""Transport: messages over torch.distributed, with one meaning on gloo and NCCL.

Every rank posts its messages in the program's order, so no tags are needed where there are none; gloo
gets them all the same. A send's tensors are let go as soon as it is complete; a receive's buffer is made
when it is posted and belongs to whoever waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.errors import RankError
from helixpipe.runtime.ledger import Ledger
from helixpipe.runtime.sends import DeviceSends, HostSends, InFlight, SendError, Work
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.program import Kind, Message
from helixpipe.sequence.wire import wire_of

# tensors in one message at most, so that each has a tag of its own
WIDTH = 64


class Transport:
    """One rank's end. `dtype` is that of values and weights, `gradient_dtype` that of weight gradients."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        timeout_s: float,
        watch: Watch,
        ledger: Ledger,
    ) -> None:
        self.group, self.device = group, device
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        self.timeout_s, self.watch, self.ledger = timeout_s, watch, ledger
        # gloo moves host memory only: CUDA tensors are staged through it
        self._wire = wire_of(group, device)
        self.host = self._wire.type == "cpu"
        self._sends = HostSends(timeout_s) if self.host else DeviceSends()
        self._receives: dict[int, InFlight] = {}

    def meet(self, messages: Iterable[Message]) -> None:
        """Let every pair that will have messages say one word, in one order. Collective.

        NCCL makes a pair's communicator at its first message, and both ranks stand still until the other comes to it.
        """
        group = _known(self.group)
        rank, word = dist.get_rank(group), torch.zeros(1, device=self._wire)
        for low, high in sorted({(min(m.src, m.dst), max(m.src, m.dst)) for m in messages}):
            if rank in (low, high):
                with self._named(f"the first word between ranks {low} and {high}", low + high - rank):
                    self._complete([group.send([word], high, 0) if rank == low else group.recv([word], low, 0)])

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        held = [self.ledger.carry(tensor.to(self._wire).contiguous()) for tensor in tensors]
        with self._named(message, message.dst):
            group = _known(self.group)
            # the group's own call: what dist.isend does around it costs more than the call
            works = [group.send([each.tensor], message.dst, _tag(message, i)) for i, each in enumerate(held)]
            self._sends.hold(InFlight(message, works, held))

    def receive(self, message: Message) -> None:
        dtype = self.gradient_dtype if message.kind is Kind.WEIGHT_GRADIENTS else self.dtype
        held = [self.ledger.carry(torch.empty(shape, dtype=dtype, device=self._wire)) for shape in message.shapes]
        with self._named(message, message.src):
            group = _known(self.group)
            works = [group.recv([each.tensor], message.src, _tag(message, i)) for i, each in enumerate(held)]
        self._receives[message.number] = InFlight(message, works, held)

    def wait(self, message: Message) -> list[Tensor]:
        """The tensors of a message, once they are here; RankError when they do not come in time."""
        flight = self._receives.pop(message.number)
        with self._named(message, message.src):
            self._complete(flight.works)
        return [each.tensor.to(self.device) for each in flight.held]

    def finish(self) -> None:
        """Wait for every send of the step."""
        with self._named(None, -1):
            self._sends.finish()

    def close(self) -> None:
        self._sends.close()

    def _complete(self, works: Sequence[Work]) -> None:
        for work in works:
            # NCCL orders the stream and returns at once; its own watchdog keeps the time
            work.wait(timedelta(seconds=self.timeout_s)) if self.host else work.wait()

    @contextmanager
    def _named(self, message: Message | str | None, peer: int) -> Iterator[None]:
        """Whatever the backend says of a failure becomes who waited for what, from whom, and what that rank did."""
        begun = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # no other rank's doing
        except (RuntimeError, SendError) as error:
            if isinstance(error, SendError):
                message, peer = error.message, error.message.dst
            waited_s = time.monotonic() - begun
            late = waited_s >= self.timeout_s - 1
            lost, told = "a rank", self.watch.others()
            if peer >= 0:
                other = self.watch.line[peer]
                lost, told = self.watch.names[other], self.watch.told(other)
            what = f"waited {waited_s:.0f} s" if late else f"lost {lost} while waiting"
            raise RankError(f"{self.watch.me}, at {self.watch.doing}, {what} for {message}; {told}") from error


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is None:
        raise RuntimeError("a message, and this process is alone")
    return group


def _tag(message: Message, index: int) -> int:
    return message.number * WIDTH + index
