"""The published memory model against published numbers, and against itself."""

from __future__ import annotations

import pytest

from helixpipe.predict.sequence_memory import (
    BERT_BASE,
    BERT_LARGE,
    Encoder,
    batch_ratio,
    length_ratio,
    linformer,
    longest,
    ring_self_attention,
    tensor_parallel,
)

# arXiv 2105.13120, Table 4: ranks, batch, length, MB with tensor parallelism (None: out of memory), with sequence
TABLE_4 = (
    (1, 64, 512, 8477, 8478),
    (2, 128, 512, 9520, 8479),
    (4, 256, 512, 12233, 8481),
    (8, 512, 512, None, 8491),
    (1, 64, 256, 3707, 3707),
    (2, 64, 512, 4993, 4671),
    (4, 64, 1024, 8176, 6602),
    (8, 64, 2048, 14862, 10536),
)


def test_by_hand() -> None:
    tiny = Encoder(layers=1, hidden=6, heads=3, head_dim=2)
    tensor = tensor_parallel(tiny, batch=5, length=4, ranks=3)
    assert tensor.parameters == 32 * 36 / 3 + 16 * 2 * 3 * 6 / 3
    assert tensor.activations == (4 * 120 / 3 + 120) + (4 * 5 * 4 * 3 * 2 / 3 + 5 * 3 * 16 / 3 + 120)
    ring = ring_self_attention(tiny, batch=5, length=4, ranks=2)
    assert ring.parameters == 32 * 36 + 16 * 2 * 3 * 6
    assert ring.activations == 5 * 120 / 2 + (4 * 5 * 3 * 4 * 2 / 2 + 5 * 3 * 16 / 2 + 120 / 2)
    projected = linformer(7)(tiny, 5, 4, 2)
    assert projected.parameters == 32 * 36 + 2 * 2 * 3 * 6
    undivided = 2 * 5 * 3 * 7 * 2
    assert projected.activations == 5 * 120 / 2 + (2 * 5 * 3 * 4 * 2 + 5 * 3 * 4 * 7 + 120) / 2 + undivided


def test_alone_both_hold_the_same_but_the_input_of_the_mlp_and_of_attention() -> None:
    for length in (128, 4096):
        tensor, ring = (method(BERT_BASE, 8, length, 1) for method in (tensor_parallel, ring_self_attention))
        assert tensor == ring


def test_published_batch_ratios() -> None:
    """13.7, 10.2 and 2.7 were measured; the ranks are those compared: tensor parallelism stops at its heads."""
    assert batch_ratio(BERT_BASE, 512, 64, 12) == pytest.approx(11.85, abs=0.005)
    assert batch_ratio(BERT_LARGE, 512, 64, 16) == pytest.approx(10.67, abs=0.005)
    assert batch_ratio(BERT_LARGE, 512, 16, 16) == pytest.approx(2.67, abs=0.005)


def test_published_length_ratios() -> None:
    """3.0 and 1.4 were measured, on 16 GB. What an element takes is not published: 2 bytes come closest."""
    budget = 16e9 / BERT_BASE.layers / 2
    assert length_ratio(BERT_BASE, 64, 64, 12, budget) == pytest.approx(3.0, rel=0.02)
    assert length_ratio(BERT_BASE, 64, 16, 12, budget) == pytest.approx(1.4, rel=0.02)


def test_published_table() -> None:
    """A line through its two rows of one rank gives the other rows."""
    long, short = (ring_self_attention(BERT_BASE, 64, length, 1).total for length in (512, 256))
    slope = (8477 - 3707) / (long - short)
    for ranks, batch, length, tensor_mb, ring_mb in TABLE_4:
        for method, published in ((tensor_parallel, tensor_mb), (ring_self_attention, ring_mb)):
            if published is not None:
                predicted = 8477 + slope * (method(BERT_BASE, batch, length, ranks).total - long)
                assert predicted == pytest.approx(published, rel=0.17 if method is tensor_parallel else 0.08)


def test_longest_is_the_last_that_fits() -> None:
    for method in (tensor_parallel, ring_self_attention, linformer(256)):
        found = longest(method, BERT_BASE, 4, 8, 1e8)
        assert method(BERT_BASE, 4, found, 8).total <= 1e8 < method(BERT_BASE, 4, found + 1, 8).total
        assert longest(method, BERT_BASE, 4, 8, 10) == 0
