"""A rank that does not come: an error that says who waited for what, within the group's own timeout."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from ranks import Ranks

from helixpipe.errors import RankError
from helixpipe.sequence import ring_attention


def alone() -> tuple[str, float] | None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if dist.get_rank() != 0:
        return None
    q = torch.zeros(1, 4, 2, 4)
    begun = time.monotonic()
    try:
        ring_attention(q, q, q, group)
    except RankError as error:
        return str(error), time.monotonic() - begun
    return None


def test_the_error_names_who_and_what(four_ranks: Ranks) -> None:
    found = four_ranks.run(alone)[0]
    assert found is not None
    message, seconds = found
    assert message.startswith("rank 0 of 2 got no keys and values from rank 1, after 1 s: ")
    assert "\n" not in message
    assert seconds < 10
