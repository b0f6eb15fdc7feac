"""Documents as they may be given, what is refused and how, and losses by position in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_logits
from ranks import Ranks, mesh_of
from torch import Tensor, nn
from values import initial_values

import helixpipe as hp
from helixpipe.runtime.documents import document_lengths
from helixpipe.runtime.programs import MOST
from helixpipe.runtime.shares import MOST_CUTS
from helixpipe.sequence import Documents

SHAPE = hp.ModelShape(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19)
ROWS = ((4, 8), (4, 8), (1, 5, 6), (12,))


def pipeline_of(model: hp.Model, segments: int = 1) -> hp.Pipeline:
    family, given = ("1f1b", {}) if segments == 1 else ("seq1f1b", {"segments": segments})
    schedule = hp.build_schedule(family, ranks=1, layers=2, microbatches=2, model=model, **given)
    return hp.Pipeline(model, schedule, dtype=torch.float64)


def ids(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.tensor([[7 * i for i, n in enumerate(row) for _ in range(n)] for row in rows])


@pytest.mark.parametrize(
    "given",
    [ROWS, [list(row) for row in ROWS], [torch.tensor(row) for row in ROWS], ids(ROWS), Documents.of(ids(ROWS), 12, 4)],
    ids=["tuples", "lists", "tensors", "ids", "Documents"],
)
def test_documents_may_be_given_as(given: Any) -> None:
    assert document_lengths(given, 4, 12) == ROWS


def test_cumulative_lengths_are_of_all_sequences() -> None:
    assert document_lengths(Documents.of((0, 5, 12), 12, 3), 3, 12) == ((5, 7),) * 3


def test_sequences_of_one_document_are_as_without() -> None:
    assert document_lengths([[12], [12]], 2, 12) == document_lengths(None, 2, 12) == ()
    tokens, targets = batch(SHAPE, 4, 12)
    pipeline = pipeline_of(hp.Decoder(SHAPE))
    assert pipeline.evaluate(tokens, targets, documents=[[12]] * 4) == pipeline.evaluate(tokens, targets)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[12]] * 3, "documents: of 3 sequences, and the batch has 4; give those of each"),
        (
            [[12], [5, 7], [5, 6], [12]],
            "documents: those of sequence 2 have 11 tokens together, and it has 12; give the lengths of all its documents, none 0",
        ),
        (
            [[12], [12, 0], [12], [12]],
            "documents: those of sequence 1 have 12 tokens together, and it has 12; give the lengths of all its documents, none 0",
        ),
        (
            [[], [12], [12], [12]],
            "documents: those of sequence 0 have 0 tokens together, and it has 12; give the lengths of all its documents, none 0",
        ),
        (
            [5, 7],
            "documents: give of each sequence the lengths of its documents, such as [[5, 7], [12]], or an id a token, int64 "
            "[sequences, tokens]",
        ),
        (
            [[5.0, 7.0]] * 4,
            "documents: give of each sequence the lengths of its documents, such as [[5, 7], [12]], or an id a token, int64 "
            "[sequences, tokens]",
        ),
        (
            torch.tensor([0, 5, 12]),
            "documents: int64 [3]; ids of documents are int64 [4, 12], one a token",
        ),
        (torch.zeros(4, 12), "documents: float32 [4, 12]; ids of documents are int64 [4, 12], one a token"),
        (
            torch.tensor([[0] * 12, [3] * 4 + [5] * 4 + [3] * 4] * 2),
            "documents: 3 comes again in sequence 1, after another; a document's tokens are neighbours: give each an id of its own",
        ),
        (
            Documents.of((0, 5, 16), 16, 4),
            "documents: made for 16 tokens, and a sequence has 12; make them anew",
        ),
        (Documents.of(ids(ROWS[:2]), 12, 2), "documents: of 2 sequences, and the batch has 4; give those of each"),
    ],
)  # fmt: skip
def test_what_does_not_cover_the_batch_is_refused(given: Any, message: str) -> None:
    tokens, targets = batch(SHAPE, 4, 12)
    pipeline = pipeline_of(hp.Decoder(SHAPE))
    for call in (pipeline.step, pipeline.evaluate, pipeline.losses):
        with pytest.raises(hp.ConfigError, match=f"^{re.escape(message)}$"):
            call(tokens, targets, documents=given)
    assert pipeline.steps == 0


class Own(nn.Module):
    """Another's module around ours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


class OwnModel:
    """A decoder with one kind of part in a module of someone's own."""

    def __init__(self, kind: str) -> None:
        self.shape, self._kind, self._decoder = Shape(kind), kind, hp.Decoder(SHAPE)

    def part(self, part: hp.Part) -> nn.Module:
        module = self._decoder.part(part)
        return Own(module) if part.kind == self._kind else module


class Shape(hp.ModelShape):
    def __init__(self, own: str) -> None:
        super().__init__(**vars(SHAPE))
        object.__setattr__(self, "own", own)

    def parameters(self, part: hp.Part) -> dict[str, tuple[int, ...]]:
        found = super().parameters(part)
        return {f"inner.{name}": size for name, size in found.items()} if part.kind == self.own else found


@pytest.mark.parametrize(("kind", "place"), [("embed", "embed"), ("qkv", "qkv.0"), ("attn", "attn.0")])
def test_a_part_that_is_not_told_of_documents_is_refused_by_name(kind: str, place: str) -> None:
    tokens, targets = batch(SHAPE, 4, 12)
    pipeline = pipeline_of(OwnModel(kind))
    message = (
        f"documents: {place} is Own, which is not told where documents begin; give it one document a sequence, or let the part "
        "be one of helixpipe.model"
    )
    with pytest.raises(hp.ConfigError, match=f"^{re.escape(message)}$"):
        pipeline.step(tokens, targets, documents=ROWS)
    pipeline.step(tokens, targets, documents=[[12]] * 4)  # which is no more than it knows


def test_a_part_that_treats_each_token_alone_may_be_anybodys() -> None:
    tokens, targets = batch(SHAPE, 4, 12)
    losses = {
        pipeline_of(model).evaluate(tokens, targets, documents=ROWS) for model in (OwnModel("mlp"), hp.Decoder(SHAPE))
    }
    assert len(losses) == 1


def test_plain_modules_are_refused_by_their_own_name() -> None:
    model = hp.Layers(nn.Embedding(19, 8), [nn.Linear(8, 8), nn.Linear(8, 8)], nn.Linear(8, 19))
    tokens, targets = batch(SHAPE, 4, 12)
    with pytest.raises(
        hp.ConfigError, match=r"^documents: embed is Embedding, which is not told where documents begin; "
    ):
        pipeline_of(model).step(tokens, targets, documents=ROWS)


def refused_on(ranks: int) -> str | None:
    """A part of the last rank alone: all refuse."""
    mesh = mesh_of(ranks)
    if mesh is None:
        return None

    class Last(OwnModel):
        def part(self, part: hp.Part) -> nn.Module:
            return super().part(part) if part.layer else hp.Decoder(SHAPE).part(part)

    model = Last("attn")
    schedule = hp.build_schedule("1f1b", ranks=ranks, layers=2, microbatches=2)
    pipeline = hp.Pipeline(model, schedule, mesh, dtype=torch.float64, timeout_s=20)
    try:
        pipeline.step(*batch(SHAPE, 4, 12), documents=ROWS)
    except hp.ConfigError as error:
        return str(error)
    finally:
        pipeline.close()
    return ""


def test_all_ranks_refuse_what_one_cannot(four_ranks: Ranks) -> None:
    one, two = four_ranks.run(refused_on, 2)[:2]
    assert one == two
    assert one.startswith("documents: attn.1 is Own, which is not told where documents begin")


def test_learned_positions_have_room_for_the_longest_document() -> None:
    shape = hp.ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19, positions="learned", context=8)
    tokens, targets = batch(shape, 2, 12)
    pipeline = pipeline_of(hp.Decoder(shape))
    pipeline.step(tokens, targets, documents=[[4, 8], [8, 4]])
    with pytest.raises(hp.ConfigError, match=r"^tokens: 9 a document, and learned positions have room for 8; "):
        pipeline.step(tokens, targets, documents=[[4, 8], [9, 3]])


@pytest.mark.parametrize("segments", [1, 3])
def test_losses_by_position_count_within_documents(segments: int) -> None:
    tokens, targets = batch(SHAPE, 4, 12)
    rows = ((4, 8), (4, 8), (1, 5, 6), (9, 3))
    found = pipeline_of(hp.Decoder(SHAPE), segments).losses(tokens, targets, documents=rows)
    w = {name: value.double() for name, value in initial_values(SHAPE).items()}
    total = {first: 0.0 for first, *_ in found.by_position}
    counted = dict.fromkeys(total, 0)
    for row, lengths in enumerate(rows):
        for t, y in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True):
            losses = F.cross_entropy(plain_logits(SHAPE, w, t.unsqueeze(0))[0], y, ignore_index=-100, reduction="none")
            for place, loss in enumerate(losses.tolist()):
                first = max(each for each in total if each <= place)
                total[first] += loss
                counted[first] += int(y[place] != -100)
    assert [(first, stop) for first, stop, *_ in found.by_position] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 9)]
    for first, _, of_bucket, count in found.by_position:
        assert abs(of_bucket - total[first]) < 1e-12
        assert count == counted[first]
    assert abs(found.total - sum(total.values())) < 1e-12


def test_ever_new_documents_leave_nothing_in_a_pipeline() -> None:
    tokens, targets = batch(SHAPE, 4, 12)
    pipeline = pipeline_of(hp.Decoder(SHAPE), 3)

    for first in range(1, 12):
        for second in range(1, 12 - first):
            pipeline.evaluate(tokens, targets, documents=[[first, second, 12 - first - second]] * 4)
    assert len(pipeline._programs._steps._made) == MOST
    assert len(pipeline._shares._starts._made) <= MOST_CUTS
