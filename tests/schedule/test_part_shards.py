"""Shards of a part, without torch: their names, values, rows and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixpipe.errors import ScheduleError
from helixpipe.parts.part import Part, Value, chain, loss_of, vocabulary_shards
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.slices import rows_of, slice_of, whole_name
from helixpipe.parts.work import Batch, Keeping, Work
from helixpipe.predict.keeping import kept
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.stage import Stage, edges

SHAPE = ModelShape(layers=2, hidden=16, heads=4, ffn=24, vocabulary=19)
BATCH = Batch(2, (7, 5))


def test_the_chain_of_a_spread_vocabulary() -> None:
    told = " ".join(map(str, chain(1, (), 3)))
    assert told == (
        "lookup.0.0/3 lookup.0.1/3 lookup.0.2/3 joined.0/3 norm.0 qkv.0 attn.0 proj.0 mlp.0 "
        "final.1 logits.1.0/3 logits.1.1/3 logits.1.2/3 loss.1/3"
    )
    assert [Part.parse(text) for text in told.split()] == list(chain(1, (), 3))
    assert str(chain(1, (), 1)[-1]) == "loss.1"
    assert [vocabulary_shards(chain(2, (), shards)) for shards in (0, 1, 4)] == [0, 1, 4]


def test_every_value_has_one_maker_and_the_loss_is_made_last() -> None:
    parts = chain(2, (), 3)
    made = [value for part in parts for value in part.makes]
    assert len(set(made)) == len(made)
    for place, part in enumerate(parts):
        assert set(part.reads) <= {value for before in parts[:place] for value in before.makes}
    assert made[-1] == loss_of(2) == chain(2)[-1].makes[0]
    assert str(parts[-2].makes[0]) == "scores.2.2/3"
    assert parts[-1].reads == tuple(Value("scores", 2, shard, 3) for shard in range(3))


def test_a_value_with_several_readers_goes_to_each() -> None:
    stages = [Stage((part,)) for part in chain(1, (), 2)]
    reading = {edge.consumer: edge.values for edge in edges(stages) if edge.producer == 8}
    assert reading == {9: (Value("f", 1),), 10: (Value("f", 1),)}


@pytest.mark.parametrize(
    "text",
    [
        "logits.2.3/3",
        "logits.2.0/1",
        "logits.2/3",
        "loss.2.0/3",
        "norm.2/3",
        "norm.2.0/3",
        "lookup/3",
        "embed/2",
        "logits.2.1",
    ],
)
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ScheduleError, match=rf"^'{text}' is not a part; write one as 'embed', 'norm.3' or 'head.32'$"):
        Part.parse(text)


@pytest.mark.parametrize("shards", [1, 2, 3, 8, 19])
def test_shards_have_every_row_once(shards: int) -> None:
    rows = [row for shard in range(shards) for row in rows_of(shard, shards, 19)]
    assert rows == list(range(19))
    for tied in (False, True):
        shape = replace(SHAPE, tied=tied, head_transform=True)
        spread = shape.parameter_elements(chain(2, (), shards))
        assert sum(spread.values()) == shape.parameter_count
        assert {whole_name(name) for name in spread} == shape.parameter_elements(shape.chain()).keys()


def test_the_name_of_a_slice_says_which_rows() -> None:
    name = SHAPE.parameter_name(Part("logits", 2, 1, 3), "output.weight")
    assert name == "head.output.weight[6:12/19]"
    assert slice_of(name) == ("head.output.weight", 6, 12, 19)
    assert slice_of(f"optimizer.{name}.exp_avg") == ("optimizer.head.output.weight.exp_avg", 6, 12, 19)
    assert slice_of("head.norm.weight") is None


def test_what_is_frozen_is_frozen_in_every_shard() -> None:
    names = [SHAPE.parameter_name(Part("lookup", 0, shard, 3), "tokens.weight") for shard in range(3)]
    assert not any(replace(SHAPE, frozen=("embed.tokens.weight",)).trains(name) for name in names)
    assert not any(SHAPE.freezing(names[:1]).trains(name) for name in names)
    assert all(replace(SHAPE, frozen=("head.*",)).trains(name) for name in names)


@pytest.mark.parametrize("keeping", [Keeping("none"), Keeping("full", 2, head_chunk=3), Keeping("selective", 8)])
def test_shards_together_do_and_keep_what_the_whole_does(keeping: Keeping) -> None:
    """The head's FLOPs; of its logits one copy and not two, and two numbers more a token and shard."""
    work = Work(SHAPE, BATCH, 1, keeping)
    whole, (final, *logits, loss) = Part("head", 2), chain(2, (), 3)[-5:]
    for price in ("forward_flops", "backward_flops", "weight_flops"):
        both = [
            sum(getattr(SHAPE, price)(part, BATCH, 1) for part in parts) for parts in ([whole], [final, *logits, loss])
        ]
        assert both[0] == both[1] > 0
    saved = [sum(work.saved(part).values()) for part in logits]
    f = 10 * 16 * keeping.element_bytes
    if keeping.head_chunk:
        assert saved == [f] * 3
    else:
        assert sum(saved) == 3 * f + 10 * (19 + 3) * keeping.wide_bytes
        assert sum(sum(work.put_off(part).values()) for part in logits) == 3 * f + 10 * 19 * keeping.element_bytes
    assert sum(work.value_bytes(part.makes[0]) for part in logits) == 3 * 2 * 10 * keeping.wide_bytes


def test_what_is_joined_is_not_kept() -> None:
    """A sum and a look-up need nothing for their backward, whatever the policy: else a rank would keep x as often as there are
    shards."""
    parts = chain(2, (), 3)
    first = Stage(parts[3:9])
    for keeping in (Keeping("none"), Keeping("full"), Keeping("selective")):
        work = Work(SHAPE, BATCH, 1, keeping)
        joined, *others = chunks(first, not keeping.recomputes)
        assert joined.graphed == keeping.recomputes
        held = kept(joined, work)
        assert not any(name.startswith("e.") for name in held)
        assert bool(held) == (not keeping.recomputes)
        assert bool(others) == keeping.recomputes
        assert not kept(chunks(Stage(parts[:1]), not keeping.recomputes)[0], work)
    normed = replace(SHAPE, embed_norm=True)
    assert kept(chunks(first, False)[0], Work(normed, BATCH, 1, Keeping("full"))).keys() == {
        "joined.0/3.rows",
        "joined.0/3.norm.statistics",
    }
