"""Addresses of weights that visited: once they are gone, a tensor there is an activation, and counts as one.

Guards against a set of addresses that outlived a visit: the next activation at one of them was 0 bytes on the ledger.
"""

from __future__ import annotations

import pytest
import torch
from oracle import batch
from ranks import Ranks, mesh_of

import helixpipe as hp

SHAPE = hp.ModelShape(layers=3, hidden=16, heads=4, ffn=24, vocabulary=19)


def addresses(dtype: torch.dtype) -> list[tuple[set[int], set[int]]]:
    """After a step and an evaluation: what counts as a weight, and where weights are."""
    mesh = mesh_of(2)
    if mesh is None:
        return []
    schedule = hp.build_schedule("helix", ranks=2, layers=3, microbatches=4, travel="attention")
    pipeline = hp.Pipeline(hp.Decoder(SHAPE), schedule, mesh, dtype=dtype, timeout_s=30)
    found = []
    for run in (pipeline.step, pipeline.evaluate, pipeline.step):
        run(*batch(SHAPE, 4, 12))
        weights = pipeline._weights
        found.append((set(weights._storages), {w.untyped_storage().data_ptr() for w in weights._working.values()}))
    pipeline.close()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_counts_as_a_weight_is_where_weights_are(four_ranks: Ranks, dtype: torch.dtype) -> None:
    for found in four_ranks.run(addresses, dtype)[:2]:
        for counted, real in found:
            assert counted == real
