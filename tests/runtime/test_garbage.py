"""A step makes no cycles, so the collector may stand still while it runs; and it is as it was afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=2, hidden=16, heads=2, ffn=32, vocabulary=17)
TOKENS = torch.zeros(4, 8, dtype=torch.int64)


@pytest.fixture
def collector() -> Iterator[None]:
    """Whatever a test does to it."""
    was_on, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.enable() if was_on else gc.disable()


def pipeline(recompute: str = "none") -> Pipeline:
    return Pipeline(Decoder(SHAPE), build_schedule("zb_h1", ranks=1, layers=2, microbatches=4), recompute=recompute)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_steps_leave_no_cycles_and_a_pipeline_is_none(collector: None, recompute: str) -> None:
    """Guards against what would hold tensors until the collector comes by, and backends until the interpreter ends."""
    gc.disable()
    made = pipeline(recompute)
    made.step(TOKENS, TOKENS)
    gc.collect()
    made.step(TOKENS, TOKENS)
    made.evaluate(TOKENS, TOKENS)
    assert gc.collect() == 0
    gone = weakref.ref(made)
    made.close()
    del made
    assert gone() is None


@pytest.mark.parametrize("is_on", [True, False])
def test_nothing_is_collected_in_a_step_and_the_collector_is_as_it_was(collector: None, is_on: bool) -> None:
    made = pipeline()
    made.step(TOKENS, TOKENS)
    gc.enable() if is_on else gc.disable()
    gc.set_threshold(1, 1, 1)  # at every turn
    inside: list[str] = []

    def heard(phase: str, info: dict[str, int]) -> None:
        inside.append(str(made._watch.doing))

    gc.callbacks.append(heard)
    try:
        made.step(TOKENS, TOKENS)
    finally:
        gc.callbacks.remove(heard)
    assert gc.isenabled() == is_on
    assert set(inside) <= {"work between steps"}
    assert bool(inside) == is_on
    with pytest.raises(ConfigError):
        made.step(TOKENS[:3], TOKENS[:3])
    assert gc.isenabled() == is_on
    made.close()
