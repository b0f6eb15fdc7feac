"""Documents in attention by itself: tiles are those of a mask, kernels see no more, segments keep what goes on."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import plain_attention
from torch import Tensor

from helixpipe.model import attention, merging
from helixpipe.model.attention import AttentionState, KeyValues, Rule, attend
from helixpipe.model.embed import Embed
from helixpipe.model.packed import Packed, packed_tiles
from helixpipe.model.rope import KEPT_SEQUENCES, Positions, Rope
from helixpipe.model.tiles import Run
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.documents import positions

LENGTHS = (6, 1, 5)
ROWS = ((4, 8), (4, 8), (1, 5, 1, 1, 4), (12,))
CPU = torch.device("cpu")


def leaves(rows: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, length, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    return [each.requires_grad_() for each in made]


def apart(q: Tensor, k: Tensor, v: Tensor, rows: tuple[tuple[int, ...], ...], rule: Rule) -> Tensor:
    """Each document by itself."""
    found = []
    for row, lengths in enumerate(rows):
        pieces, begin = [], 0
        for length in lengths:
            here = [t[row : row + 1, begin : begin + length].transpose(1, 2) for t in (q, k, v)]
            pieces.append(plain_attention(*here, rule.causal, rule.window, rule.softcap, rule.scale)[0].transpose(1, 2))
            begin += length
        found.append(torch.cat(pieces, 1))
    return torch.cat(found).flatten(2)


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
def test_whole_sequences(causal: bool, window: int, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_at_once", lambda k: 1)  # head by head, as of long sequences
    rule, state = Rule(causal, window), AttentionState(in_place=in_place, batch=Batch(4, (12,), ROWS))
    given = leaves(4, 12)
    wanted = apart(*given, ROWS, rule)
    gradient = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_wanted = torch.autograd.grad(wanted, given, gradient)
    made = attend(*(t.clone() for t in given), rule, state)
    torch.testing.assert_close(made, wanted, atol=1e-13, rtol=0)
    of_made = torch.autograd.grad(made, given, gradient)
    torch.testing.assert_close(of_made, of_wanted, atol=1e-13, rtol=0)


@pytest.mark.parametrize("window", [0, 3])
def test_segments(window: int) -> None:
    rule, batch = Rule(window=window), Batch(4, LENGTHS, ROWS)
    given = leaves(4, 12)
    wanted = apart(*given, ROWS, rule)
    gradient = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_wanted = torch.autograd.grad(wanted, given, gradient)
    past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor), batch=batch)
    pieces = [
        [t.detach().requires_grad_() for t in each] for each in zip(*(t.split(LENGTHS, 1) for t in given), strict=True)
    ]
    made = [attend(*piece, rule, AttentionState(None, past, i, batch=batch)) for i, piece in enumerate(pieces)]
    torch.testing.assert_close(torch.cat(made, 1), wanted, atol=1e-13, rtol=0)
    found = [torch.autograd.grad(made[i], pieces[i], gradient.split(LENGTHS, 1)[i]) for i in (2, 1, 0)][::-1]
    of_made = tuple(torch.cat(each, 1) for each in zip(*found, strict=True))
    torch.testing.assert_close(of_made, of_wanted, atol=1e-13, rtol=0)
    assert not past.keys
    assert not past.owed


@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_every_pair_of_a_document_is_in_one_tile(causal: bool, window: int) -> None:
    """Of each sequence, counted against a mask: queries at `start` to `stop`, keys at `first` to `last`."""
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in ROWS])
    for (start, stop), (first, last) in itertools.product([(0, 12), (4, 9), (6, 7)], [(0, 12), (0, 6), (6, 7)]):
        if causal and last > stop:
            continue
        runs = Run(0, 1, stop - start), Run(first - start, 1, last - first)
        seen = torch.zeros(len(ROWS), stop - start, last - first, dtype=torch.int64)
        for batch, tile in packed_tiles(Packed(ROWS, start), *runs, causal, window):
            square = torch.ones(tile.q_stop - tile.q_start, tile.k_stop - tile.k_start, dtype=torch.int64)
            if tile.causal:
                square = square.triu() if tile.flipped else square.tril()
            seen[batch, tile.queries, tile.keys] += square
        q, k = torch.arange(start, stop).unsqueeze(1), torch.arange(first, last)
        wanted = documents[:, start:stop].unsqueeze(2) == documents[:, first:last].unsqueeze(1)
        wanted &= (k <= q) if causal else torch.ones((), dtype=torch.bool)
        wanted &= ((q - k).abs() < window) if window else torch.ones((), dtype=torch.bool)
        assert torch.equal(seen, wanted.long())


def test_what_is_masked_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements of scores in all kernel calls: squares of documents, and no empty ones."""
    found: list[tuple[int, int, int]] = []
    kernel = merging.attention_forward

    def counted(q: Tensor, k: Tensor, *given: Any) -> Any:
        found.append((q.shape[0], q.shape[2], k.shape[2]))
        return kernel(q, k, *given)

    monkeypatch.setattr(merging, "attention_forward", counted)
    attend(*leaves(4, 12), Rule(), AttentionState(batch=Batch(4, (12,), ROWS)))
    assert sorted(found) == sorted([(2, n, n) for n in ROWS[0]] + [(1, n, n) for n in (*ROWS[2], *ROWS[3])])


def test_a_segment_keeps_what_its_documents_go_on_with() -> None:
    for rows, kept in (
        (((6, 1, 5), (3, 3, 1, 5)), [0, 0, 0]),
        (((6, 1, 5), (3, 4, 5)), [3, 0, 0]),
        (((4, 8), (6, 1, 5)), [2, 1, 0]),
        (((12,), (6, 6)), [6, 1, 0]),
    ):
        batch = Batch(2, LENGTHS, rows)
        past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor), batch=batch)
        pieces = zip(*(t.detach().split(LENGTHS, 1) for t in leaves(2, 12)), strict=True)
        for i, piece in enumerate(pieces):
            attend(*(t.clone() for t in piece), Rule(), AttentionState(None, past, i, batch=batch))
        assert [held.tensor.shape[1] for held in past.keys.values()] == kept
        for held in past.keys.values():  # and nothing else alive
            assert held.tensor.untyped_storage().nbytes() == held.tensor.nbytes


def at(rows: tuple[tuple[int, ...], ...]) -> Positions:
    return positions(Batch(len(rows), (sum(rows[0]),), rows), CPU)


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(),
        Rotary("yarn", factor=4.0, original=8),
        Rotary("dynamic", factor=2.0, original=3),
        Rotary("longrope", factor=3.0, original=5, short_factor=(1.0, 1.25), long_factor=(1.5, 3.0)),
    ],
    ids=lambda rotary: rotary.type,
)
def test_documents_are_turned_as_sequences_of_their_own(rotary: Rotary) -> None:
    """Whatever a scaling makes of a length: it is the document's."""
    x = leaves(4, 12)[0]
    rope = Rope(4, 50.0, rotary)
    made = rope(x, at(ROWS), 12)
    pieces = [
        torch.cat([Rope(4, 50.0, rotary)(t, 0, t.shape[1]) for t in x[row : row + 1].split(lengths, 1)], 1)
        for row, lengths in enumerate(ROWS)
    ]
    wanted = torch.cat(pieces)
    assert torch.equal(made, wanted)
    (one,), (two,) = (torch.autograd.grad(each.square().sum() + each.sum(), x) for each in (made, wanted))
    torch.testing.assert_close(one, two, atol=1e-13, rtol=0)


def test_rotary_tables_do_not_grow_with_ever_new_documents() -> None:
    """Nor does a rotation keep any: rows of the sequence's one table are gathered in the forward and in the backward."""
    rope, x = Rope(4, 50.0), leaves(1, 12)[0]
    for first in range(1, 12):
        made = rope(x, at(((first, 12 - first),)), 12)
        assert made.grad_fn is not None
        assert made.grad_fn.saved_tensors == ()  # type: ignore[attr-defined]
    assert len(rope.tables) == 1 < KEPT_SEQUENCES


def test_learned_positions_start_anew() -> None:
    shape = ModelShape(layers=1, hidden=8, heads=2, ffn=8, vocabulary=9, positions="learned", context=12)
    embed = Embed(shape).double()
    for weight in embed.parameters():  # a part is made with empty memory
        torch.nn.init.normal_(weight)
    tokens = torch.zeros(4, 12, dtype=torch.int64)
    made = embed(tokens, at(ROWS))
    for row, lengths in enumerate(ROWS):
        begin = 0
        for length in lengths:
            assert torch.equal(made[row, begin : begin + length], embed(tokens[:1], 0)[0, :length])
            begin += length
