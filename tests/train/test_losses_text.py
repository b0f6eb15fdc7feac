"""An evaluation as a table and as JSON, also of what is no number and of heads that know no positions."""

from __future__ import annotations

import json
import math

from helixpipe.runtime.losses import Bucket, Losses
from helixpipe.train.losses_text import Evaluation

BUCKETS = (Bucket(0, 1, 50.0, 10), Bucket(1, 2, 40.0, 10), Bucket(2, 1500, 29960.0, 14980))
FOUND = Evaluation(Losses(30050.0, 15000, BUCKETS), "runs/a-1/checkpoints/step-00000120", 120, 10, 1500)


def test_a_table_tells_the_loss_and_where_it_is() -> None:
    assert FOUND.table() == (
        "held-out loss of runs/a-1/checkpoints/step-00000120\n"
        "\n"
        "loss         2.0033 nats a token\n"
        "perplexity   7.414\n"
        "tokens       15,000 counted, in 10 sequences of 1,500\n"
        "\n"
        "position      loss  tokens\n"
        "0           5.0000      10\n"
        "1           4.0000      10\n"
        "2 to 1,499  2.0000  14,980"
    )


def test_json_has_the_same() -> None:
    assert json.loads(FOUND.to_json()) == {
        "weights": "runs/a-1/checkpoints/step-00000120",
        "step": 120,
        "loss": 30050 / 15000,
        "perplexity": math.exp(30050 / 15000),
        "tokens": 15000,
        "sequences": 10,
        "sequence_length": 1500,
        "by_position": [
            {"first": 0, "last": 0, "loss": 5.0, "tokens": 10},
            {"first": 1, "last": 1, "loss": 4.0, "tokens": 10},
            {"first": 2, "last": 1499, "loss": 2.0, "tokens": 14980},
        ],
    }


def test_what_is_no_number_is_null_and_no_error() -> None:
    broken = FOUND._replace(losses=Losses(math.nan, 10, (Bucket(0, 1, math.nan, 10), Bucket(1, 2, 0.0, 0))))
    told = json.loads(broken.to_json())
    assert (told["loss"], told["perplexity"], [each["loss"] for each in told["by_position"]]) == (
        None,
        None,
        [None, None],
    )
    assert "loss         nan nats a token\nperplexity   nan\n" in broken.table()
    huge = FOUND._replace(losses=Losses(1e4, 10, (Bucket(0, 1, 1e4, 10),)))
    assert (json.loads(huge.to_json())["loss"], json.loads(huge.to_json())["perplexity"]) == (1000.0, None)
    assert "perplexity   inf\n" in huge.table()
    assert "perplexity   2.688e+43\n" in FOUND._replace(losses=Losses(1e3, 10, ())).table()


def test_a_head_that_gives_one_sum_is_said() -> None:
    without = FOUND._replace(losses=Losses(20.0, 10, (), "head.2 gives one sum; let its module have it"))
    assert without.table().endswith("\n\nby position  not known: head.2 gives one sum; let its module have it")
    told = json.loads(without.to_json())
    assert (told["loss"], told["by_position"]) == (2.0, None)
    assert told["by_position_not_known"] == "head.2 gives one sum; let its module have it"
