"""Losses by position: sums over buckets, and heads that know no more than one sum."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_logits
from others import Others
from ranks import Ranks
from torch import Tensor, nn
from values import initial_values

import helixpipe as hp
from helixpipe.model.head import Head
from helixpipe.runtime.losses import Bucket, Losses, bucketed, buckets

SHAPE = hp.ModelShape(layers=2, hidden=8, heads=2, ffn=16, vocabulary=19)
ONE_SUM = "head.2 gives one sum; let its module have token_losses(x, targets) -> [b, s]"


def pipeline_of(model: hp.Model, layers: int = 2, microbatches: int = 1, ranks: int = 1) -> hp.Pipeline:
    schedule = hp.build_schedule("1f1b", ranks=ranks, layers=layers, microbatches=microbatches, model=model)
    return hp.Pipeline(model, schedule, dtype=torch.float64, timeout_s=30)


class Changed:
    """A Decoder with another head."""

    def __init__(self, head: type[nn.Module]) -> None:
        self.shape, self._decoder, self._head = SHAPE, hp.Decoder(SHAPE), head

    def part(self, part: hp.Part) -> nn.Module:
        found = self._decoder.part(part)
        if part.kind == "head":
            found.__class__ = self._head
        return found


class Doubled(Head):
    """Another loss, of which nobody may take the cross entropy."""

    def whole(self, x: Tensor, *others: Tensor) -> Tensor:
        return 2 * super().whole(x, *others)


class Wrong(Head):
    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return super().token_losses(x, targets).sum(0)


def test_buckets_are_powers_of_two_up_to_the_length() -> None:
    assert buckets(1) == [(0, 1)]
    assert buckets(2) == [(0, 1), (1, 2)]
    assert buckets(3) == [(0, 1), (1, 2), (2, 3)]
    assert buckets(8) == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert buckets(9) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_a_token_is_in_the_bucket_of_its_position_wherever_it_stands(length: int) -> None:
    values = torch.arange(1, 2 * length + 1, dtype=torch.float64).view(2, length)
    whole = [float(values[:, first:stop].sum()) for first, stop in buckets(length)]
    assert bucketed(values, 0, length).tolist() == whole
    mixed = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    assert bucketed(values[:, mixed], mixed, length).tolist() == whole
    half = length // 2
    assert (bucketed(values[:, :half], 0, length) + bucketed(values[:, half:], half, length)).tolist() == whole


def test_what_is_no_number_stays_in_its_bucket() -> None:
    values = torch.ones(1, 8)
    values[0, 5] = math.nan
    found = bucketed(values, 0, 8).tolist()
    assert found[:3] == [1, 1, 2]
    assert math.isnan(found[3])


def test_sums_of_batches_join_into_those_of_all() -> None:
    """Also of sequences of other lengths, and with means that differ."""
    pipeline = pipeline_of(hp.Decoder(SHAPE))
    tokens, targets = batch(SHAPE, 3, 12)
    whole = pipeline.losses(tokens, targets)
    parts = [pipeline.losses(tokens[rows], targets[rows]) for rows in (slice(1), slice(1, 3))]
    short = pipeline.losses(tokens[:, :5], targets[:, :5])
    pipeline.close()
    joined = Losses.joined(parts)
    assert joined.total == pytest.approx(whole.total, rel=1e-14)
    assert [b.total for b in joined.by_position] == pytest.approx([b.total for b in whole.by_position], rel=1e-14)
    assert [b[:2] + b[3:] for b in joined.by_position] == [b[:2] + b[3:] for b in whole.by_position]
    both = Losses.joined([short, whole])
    assert [(b.first, b.stop) for b in both.by_position] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 12)]
    assert both.by_position[3].counted == short.by_position[3].counted + whole.by_position[3].counted
    assert Losses.joined([]) == Losses(0.0, 0)


def test_losses_are_evaluate_s_and_change_nothing() -> None:
    pipeline = pipeline_of(hp.Decoder(SHAPE, head_chunk=5), microbatches=2)
    tokens, targets = batch(SHAPE, 4, 12)
    losses = pipeline.losses(tokens, targets)
    assert losses.counted == hp.counted(targets) == 44
    assert losses.mean == pytest.approx(pipeline.evaluate(tokens, targets), abs=1e-14)
    assert losses.mean == pytest.approx(pipeline.step(tokens, targets), abs=1e-12)
    assert pipeline.steps == 1
    pipeline.close()


@pytest.mark.parametrize("chunk", [0, 3])
def test_every_kind_of_head_tells_by_position_without_the_z_loss(chunk: int) -> None:
    shape = dataclasses.replace(SHAPE, head_softcap=0.2, head_transform=True, bias=True)
    pipeline = pipeline_of(hp.Decoder(shape, head_chunk=chunk, z_loss=10.0))
    tokens, targets = batch(shape, 2, 8)
    losses = pipeline.losses(tokens, targets)
    pipeline.close()
    weights = {name: value.double() for name, value in initial_values(shape).items()}
    each = F.cross_entropy(plain_logits(shape, weights, tokens).mT, targets, ignore_index=-100, reduction="none")
    expected = [float(each[:, first:stop].sum()) for first, stop in ((0, 1), (1, 2), (2, 4), (4, 8))]
    assert [b.total for b in losses.by_position] == pytest.approx(expected, rel=1e-12)
    assert losses.total == pytest.approx(sum(expected), rel=1e-12)


def test_where_nothing_counts_there_is_no_mean_and_no_warning() -> None:
    pipeline = pipeline_of(hp.Decoder(SHAPE))
    tokens, targets = batch(SHAPE, 2, 4)
    targets[:, 0] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some, none = pipeline.losses(tokens, targets), pipeline.losses(tokens, torch.full_like(targets, -100))
    pipeline.close()
    assert some.by_position[0] == Bucket(0, 1, 0.0, 0)
    assert math.isnan(some.by_position[0].mean)
    assert (none.total, none.counted) == (0.0, 0)
    assert math.isnan(none.mean)


@pytest.mark.parametrize("make", [lambda: Changed(Doubled), Others], ids=["doubled", "others"])
def test_a_head_that_gives_one_sum_still_evaluates(make: type[Others]) -> None:
    model = make()
    layers = model.shape.layers
    pipeline = pipeline_of(model, layers)
    tokens, targets = batch(model.shape, 2, 8)
    losses, evaluated = pipeline.losses(tokens, targets), pipeline.evaluate(tokens, targets)
    assert losses.mean == pytest.approx(evaluated, abs=1e-14)
    assert evaluated == pytest.approx(pipeline.step(tokens, targets), abs=1e-12)
    assert losses.by_position == ()
    assert losses.without == ONE_SUM.replace("head.2", f"head.{layers}")
    joined = Losses.joined([losses, losses])
    assert (joined.by_position, joined.without, joined.total) == ((), losses.without, 2 * losses.total)
    pipeline.close()


def one_sum() -> Losses:
    """On a rank."""
    model = Changed(Doubled)
    shape = dataclasses.replace(SHAPE, layers=4)
    model.shape, model._decoder = shape, hp.Decoder(shape)
    pipeline = pipeline_of(model, 4, 2, ranks=4)
    found = pipeline.losses(*batch(SHAPE, 2, 8))
    pipeline.close()
    return found


def test_every_rank_knows_that_the_head_gives_one_sum(four_ranks: Ranks) -> None:
    results = four_ranks.run(one_sum)
    assert results == [results[0]] * 4
    assert results[0].without == ONE_SUM.replace("head.2", "head.4")
    assert results[0].counted == 14


def test_losses_of_tokens_in_another_shape_are_refused() -> None:
    pipeline = pipeline_of(Changed(Wrong))
    with pytest.raises(hp.ConfigError) as caught:
        pipeline.losses(*batch(SHAPE, 2, 8))
    assert str(caught.value) == "head.2: Wrong gave loss as float64 [8]; give it as float64 []"
    pipeline.close()


class Own(nn.Module):
    """A head that gives the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(8, 19)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.output(x).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class Telling(Own):
    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.output(x).mT, targets, ignore_index=-100, reduction="none")


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.square().sum()


@pytest.mark.parametrize("chosen", ["logits", "telling", "own", "loss"])
def test_plain_modules_are_known_by_position_where_they_can_be(chosen: str) -> None:
    torch.manual_seed(3)
    head = {"telling": Telling, "own": Own}.get(chosen, lambda: nn.Linear(8, 19))()
    embed, layers = nn.Embedding(19, 8), [nn.Linear(8, 8)]
    pipeline = pipeline_of(hp.Layers(embed, layers, head, loss=squared if chosen == "loss" else None), 1)
    tokens, targets = batch(SHAPE, 2, 6)
    losses = pipeline.losses(tokens, targets)
    assert losses.mean == pytest.approx(pipeline.evaluate(tokens, targets), abs=1e-14)
    pipeline.close()
    if chosen in ("own", "loss"):
        assert losses.without == ONE_SUM.replace("head.2", "head.1")
        return
    x = layers[0].double()(embed.double()(tokens))
    output = (head.output if isinstance(head, Own) else head).double()
    each = F.cross_entropy(output(x).mT, targets, ignore_index=-100, reduction="none").detach()
    expected = [float(each[:, first:stop].sum()) for first, stop in ((0, 1), (1, 2), (2, 4), (4, 6))]
    assert [b.total for b in losses.by_position] == pytest.approx(expected, rel=1e-12)
