"""Parcel: a message's small tensors as one. On a host a send costs more than a copy of them.

    q | k | v   ──► [ q k v ] ──►   q | k | v       each a tensor of its own again, which lives as long as its readers need it

Large tensors go as they are: there a copy costs more than a send, and would be as much memory again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from helixpipe.schedule.program import Message

# gloo between two processes of a machine: up to here packed messages cost the processors less (benchmarks/host_work)
MOST_BYTES = 2**17


def is_parcel(message: Message, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a message goes as one tensor: small ones of one precision; both of its ends find the same."""
    return len(dtypes) > 1 and len(set(dtypes)) == 1 and message.elements * dtypes[0].itemsize <= MOST_BYTES


def packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def unpacked(parcel: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    pieces = parcel.split([math.prod(shape) for shape in shapes])
    return [piece.clone().view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
