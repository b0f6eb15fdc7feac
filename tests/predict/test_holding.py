"""The part that holds a schedule back, by name; and where a step's seconds go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting, estimate_family
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.holding import holding
from helixpipe.predict.worth import worth
from helixpipe.train.model_flops import ModelFlops

LLAMA = replace(SHAPES["llama3-8b"], layers=8)
SETTING = Setting(
    LLAMA, 8192, named_accelerator("h100"), named_link("infiniband"), Keeping("selective", 2, device="cuda"),
    data_parallel=2,
)  # fmt: skip


def test_a_head_on_one_rank_is_named() -> None:
    held = holding(estimate_family(SETTING, "1f1b", 4, 4, layers_per_stage=(2, 2, 2, 2)))
    assert held is not None
    assert (held.what, held.rank) == ("the head", 3)
    assert held.busy_s > 1.02 * held.others_s


def test_shards_of_the_vocabulary_are_told_in_words() -> None:
    """It said `the joined`."""
    small = replace(SETTING, shape=replace(LLAMA, hidden=512, ffn=1024, heads=8, kv_heads=8), sequence_length=4096)
    held = holding(estimate_family(small, "1f1b", 8, 8, vocabulary="spread"))
    assert held is not None
    assert held.what == "summing up the embedding's shards"


def test_a_rank_with_more_layers_is_named() -> None:
    few = replace(SETTING, shape=replace(LLAMA, layers=7, vocabulary=64))
    held = holding(estimate_family(few, "1f1b", 3, 4))
    assert held is not None
    assert held.what == "its 3 layers, 2 on others"


def test_where_all_have_as_much_to_do_nothing_is_named() -> None:
    assert holding(estimate_family(replace(SETTING, shape=replace(LLAMA, vocabulary=64)), "1f1b", 4, 4)) is None
    assert holding(estimate_family(SETTING, "1f1b", 1, 4)) is None


@pytest.mark.parametrize(("ranks", "recompute"), [(1, "none"), (4, "selective"), (4, "full")])
def test_the_reasons_add_up_to_the_step(ranks: int, recompute: str) -> None:
    setting = replace(
        SETTING, tensor_parallel=2, tensor_link=named_link("nvlink"), keeping=Keeping(recompute, 2, device="cuda")
    )
    found = estimate_family(setting, "1f1b", ranks, 4)
    sequence_flops = ModelFlops(LLAMA).of_document(8192)
    told = worth(found, sequence_flops)
    assert sum(told.seconds.values()) == pytest.approx(found.step_s)
    assert min(told.seconds.values()) >= -1e-9
    assert (told.seconds["computed again"] > 0) == (recompute != "none")
    assert told.seconds["messages that nothing hides"] > 0
    assert told.seconds["sums of gradients"] == pytest.approx(found.reduction_s)
    assert told.model_flops_utilisation == pytest.approx(8 * sequence_flops / (found.step_s * ranks * 2 * 2 * 989e12))
    assert sum(told.bytes) == found.peak_bytes
    assert told.accelerator_hours(3600 * told.tokens_per_s) == pytest.approx(1)
