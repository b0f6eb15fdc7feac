"""Model FLOPs: against sums written down by hand, of whole sequences, documents, padding, and models that are frozen in part."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helixpipe.parts.lora import Lora
from helixpipe.parts.shape import ModelShape
from helixpipe.train.model_flops import ModelFlops
from helixpipe.train.rows import Row

SHAPE = ModelShape(layers=3, hidden=8, heads=4, kv_heads=2, ffn=20, vocabulary=30)
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20
"""Parameters that multiply every token: q, k and v, the output projection, three matrices of the MLP."""
HEAD = 8 * 30


def row(*counts: int, documents: tuple[int, ...] = ()) -> Row:
    return Row(0, np.zeros(len(counts), np.int64), np.array(counts), documents, np.zeros(0, np.int64))


def attention(tokens: int) -> float:
    """Of a layer, forward: a product for the scores and one for the output, of half of all pairs."""
    return 2 * 2 * 8 * tokens**2 / 2


def whole(tokens: int) -> float:
    """Six FLOPs a parameter and token; attention's backward is twice its forward."""
    return 6 * tokens * (3 * LAYER + HEAD) + 3 * 3 * attention(tokens)


def test_a_step_of_whole_sequences() -> None:
    assert ModelFlops(SHAPE).of([row(16), row(16)], 16) == 2 * whole(16)


def test_documents_attend_to_themselves_and_padding_is_no_work() -> None:
    packed = row(5, 7, documents=(5, 7, 4))
    assert ModelFlops(SHAPE).of([packed, row(9, documents=(9, 7))], 16) == whole(5) + whole(7) + whole(9)
    assert ModelFlops(SHAPE).of([row(5, 7)], 16) == whole(12)  # attention goes across them
    assert ModelFlops(SHAPE).of([row(3, 13, documents=(2, 10, 4))], 16) == whole(2) + whole(10) + whole(4)


def test_what_is_frozen_has_no_weight_gradients_and_below_it_is_no_backward() -> None:
    last = dataclasses.replace(SHAPE, frozen=("embed.*", "layers.[01].*"))
    forward = 2 * 16 * (3 * LAYER + HEAD) + 3 * attention(16)
    # layer 2: its norm is the lowest part that is trained, so qkv has both gradients
    backward = 4 * 16 * (LAYER + HEAD) + 2 * attention(16)
    assert ModelFlops(last).of([row(16)], 16) == forward + backward
    assert ModelFlops(dataclasses.replace(SHAPE, frozen=("*",))).of([row(16)], 16) == forward
    # of a part that is frozen by half, half of its weight gradients
    halved = dataclasses.replace(SHAPE, frozen=("layers.2.qkv.q.*",))
    assert ModelFlops(halved).of([row(16)], 16) == whole(16) - 2 * 16 * 8 * 8


def test_adapters_have_weight_gradients_and_nothing_else_has() -> None:
    shape = dataclasses.replace(SHAPE, lora=Lora(2, targets=("q", "down")))
    q, down = 2 * (8 + 8), 2 * (20 + 8)
    forward = 2 * 16 * (3 * (LAYER + q + down) + HEAD) + 3 * attention(16)
    weights = 2 * 16 * 3 * (q + down)
    # qkv of layer 0 is the lowest part with adapters: nobody asks for the gradient of its input
    inputs = 2 * 16 * (3 * (LAYER + q + down) + HEAD) + 3 * 2 * attention(16) - 2 * 16 * (8 * 8 + 2 * 8 * 4 + q)
    assert ModelFlops(shape).of([row(16)], 16) == pytest.approx(forward + weights + inputs, rel=1e-12)


def test_windows_count_what_they_show() -> None:
    shape = dataclasses.replace(SHAPE, window=4)
    pairs = sum(min(i + 1, 4) for i in range(16))
    assert ModelFlops(shape).of([row(16)], 16) == whole(16) - 3 * 3 * (attention(16) - 4 * 8 * pairs)
