"""Tables of rotary positions: kept while a sequence's segments come again, and not for ever."""

from __future__ import annotations

import torch
from torch import Tensor

from helixpipe.model.rope import KEPT_SEQUENCES, Rope, Start
from helixpipe.parts.shapes import SHAPES
from helixpipe.runtime.profiling import default_cuts

CPU = torch.device("cpu")


def table(rope: Rope, start: Start, length: int) -> Tensor:
    return rope.table(start, length, CPU, torch.float32)[0]


def held(rope: Rope) -> int:
    """Tokens of all tables."""
    return sum(len(cos) for cos, _ in rope.tables.values())


def test_ever_new_lengths_do_not_pile_up() -> None:
    rope = Rope(4, 1e4)
    most = 0
    for length in range(1, 301):
        assert len(table(rope, 0, length)) == length
        most = max(most, held(rope))
    for _ in range(50):  # positions of a rank that has every other token: a tensor each time
        assert len(table(rope, torch.arange(0, 300, 2), 150)) == 150
        most = max(most, held(rope))
    assert most <= KEPT_SEQUENCES * 300


def test_segments_that_come_again_find_their_table() -> None:
    rope = Rope(4, 1e4)
    for cuts in ([(16,) * 256], [(4096,), (2048, 2048), (3000, 1000, 96)], default_cuts(SHAPES["tiny"], 4096)):
        places = [(sum(cut[:i]), length) for cut in cuts for i, length in enumerate(cut)]
        made = [table(rope, *place) for place in places]
        assert all(table(rope, *place) is found for place, found in zip(places, made, strict=True))


def test_a_table_made_again_is_the_same() -> None:
    rope = Rope(4, 1e4)
    first = table(rope, 7, 100)
    for length in range(101, 200):
        table(rope, 0, length)
    again = table(rope, 7, 100)
    assert again is not first
    assert torch.equal(again, first)
