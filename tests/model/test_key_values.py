"""Keys and values of earlier segments, and what they are owed: in float32 or wider, counted, and let go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracle import batch

from helixpipe.model.attention import KeyValues
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.memory import held_bytes
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower


def test_what_is_owed_is_summed_in_float32() -> None:
    past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor))
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    for segment in range(600):
        past.add(segment, one, one)
    for segment in range(599, 0, -1):
        past.owe(range(segment), one.expand(1, segment, 1, 1), one.expand(1, segment, 1, 1))
        past.settle(segment, one, one)
    dk, dv = past.settle(0, one, one)
    assert dk.item() == dv.item() == 600, "a sum in bfloat16 stops at 256"
    assert dk.dtype == torch.bfloat16
    assert not past.owed


def test_what_is_owed_keeps_no_more_than_itself_alive() -> None:
    past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor))
    piece, whole = torch.ones(1, 2, 1, 4), torch.ones(1, 6, 1, 4)
    for segment in range(3):
        past.add(segment, piece, piece)
    past.owe(range(2), whole[:, :4], whole[:, :4])
    assert [past.owed[s][0].tensor.untyped_storage().nbytes() for s in range(2)] == [piece.nbytes] * 2


def test_pieces_of_the_prefix_are_not_copied_on_a_cpu() -> None:
    past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor))
    k, v = torch.rand(3, 1, 2, 1, 4), torch.rand(3, 1, 2, 1, 4)
    for segment in range(3):
        past.add(segment, k[segment], v[segment])
    assert past.blocks(0) == []
    assert [segments for segments, *_ in past.blocks(2)] == [range(1), range(1, 2)]
    assert [block[1].data_ptr() for block in past.blocks(2)] == [k[0].data_ptr(), k[1].data_ptr()]
    torch.testing.assert_close(past.prefix(range(2))[1], torch.cat((v[0], v[1]), 1))


@pytest.mark.parametrize("family", ["seq1f1b", "seq1f1b_zb"])
def test_what_is_owed_is_counted_and_predicted(family: str) -> None:
    shape = ModelShape(layers=2, hidden=64, heads=4, ffn=128, vocabulary=64, mlp="gelu", norm="layer")
    lengths = (24, 20, 20)
    schedule = build_schedule(family, ranks=1, layers=2, microbatches=2, segments=3)
    pipeline = Pipeline(Decoder(shape), schedule, recompute="selective", segment_lengths=lengths)
    pipeline.step(*batch(shape, 2, 64))
    held = [point.kept_bytes for point in pipeline.timeline().memory[0][1::2]]
    program = lower(schedule, shape, Batch(1, lengths))
    assert held == [each.left_bytes for each in held_bytes(program, Keeping("selective"))[0]]
