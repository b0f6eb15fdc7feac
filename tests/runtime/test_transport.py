"""Transport: pairs that meet before the first step, and what carries messages between devices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import Ranks

from helixpipe.runtime.transport import Transport
from helixpipe.runtime.watch import Watch
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.shape import Batch, ModelShape

SHAPE = ModelShape(layers=8, hidden=8, heads=2, ffn=16, vocabulary=11)


def met() -> int:
    """Interleaved: the last rank's messages go to the first, so that the pairs are a circle."""
    schedule = build_schedule("interleaved", ranks=4, layers=8, microbatches=1, stages_per_rank=2)
    watch = Watch(None, dist.get_rank(), 4)
    transport = Transport(dist.group.WORLD, torch.device("cpu"), torch.float32, torch.float32, 20.0, watch)
    transport.meet(lower(schedule, SHAPE, Batch(1, (1,))).messages)
    transport.close()
    return transport.buffer_bytes


def test_pairs_in_a_circle_meet(four_ranks: Ranks) -> None:
    assert four_ranks.run(met) == [0, 0, 0, 0]
