"""What a batch says of its documents, against masks written out."""

from __future__ import annotations

import random

import pytest
import torch

from helixpipe.errors import ConfigError
from helixpipe.parts.work import Batch


def seen_by(lengths: tuple[int, ...], causal: bool, window: int) -> torch.Tensor:
    """bool [s, s]: query i, key j."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(ids))
    mask = ids[:, None] == ids[None, :]
    if causal:
        mask &= at[:, None] >= at[None, :]
    if window:
        mask &= (at[:, None] - at[None, :]).abs() < window
    return mask


def cut(total: int, draw: random.Random) -> tuple[int, ...]:
    places = sorted(draw.sample(range(1, total), draw.randint(0, min(5, total - 1))))
    return tuple(b - a for a, b in zip([0, *places], [*places, total], strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_what_segments_see_of_documents_is_what_a_mask_shows(seed: int) -> None:
    draw = random.Random(seed)
    total = draw.randint(2, 24)
    segments = cut(total, draw)
    rows = tuple(cut(total, draw) for _ in range(draw.randint(1, 3)))
    window = draw.choice((0, 0, 1, 2, 5, 30))
    batch = Batch(len(rows), segments, rows)
    masks = [seen_by(row, True, window) for row in rows]
    starts = [batch.start(s) for s in range(len(segments))]
    for s, (start, length) in enumerate(zip(starts, segments, strict=True)):
        stop = start + length
        earlier = torch.stack([mask[start:stop, :start].any(0) for mask in masks]).any(0)
        first = int(earlier.nonzero().min()) if earlier.any() else start
        assert batch.seen(s, window) == range(next(t for t in range(s + 1) if first < starts[t] + segments[t]), s)
        later = [mask[stop:, start:stop].any(0) for mask in masks]
        assert batch.tail(s, window) == max(length - int(keys.nonzero().min()) if keys.any() else 0 for keys in later)
        for causal in (True, False):
            shown = sum(int(seen_by(row, causal, window)[start:stop].sum()) for row in rows)
            half = 0 if window or not causal else length * len(rows) / 2  # the half counts half of each diagonal
            assert batch.pairs(s, causal, window) == shown - half


def test_a_sequence_without_documents_is_one_document() -> None:
    plain, one = Batch(2, (3, 4)), Batch(2, (3, 4), ((7,), (7,)))
    for segment in (0, 1):
        assert plain.pairs(segment, True) == one.pairs(segment, True)
        assert plain.seen(segment) == one.seen(segment)
        assert plain.tail(0, 3) == one.tail(0, 3)


@pytest.mark.parametrize(
    ("documents", "said"), [(((4,),), "of 1 sequences"), (((4,), (5,)), "add up to 5"), (((4,), (4, 0)), "none 0")]
)
def test_documents_that_do_not_cover_their_sequences_are_refused(
    documents: tuple[tuple[int, ...], ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Batch(2, (1, 3), documents)
