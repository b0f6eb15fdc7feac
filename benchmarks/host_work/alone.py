"""What an action costs the host without messages: one rank, 1F1B, one layer with embedding and head, tiny tensors.

    the 5th percentile of an action's seconds    beside    the same modules called and differentiated one after another

The clock of one thread. A percentile and not a mean, since others may run here: most actions of a busy machine are disturbed, and
the 5th of a hundred is the same to a few percent, busy or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from actions import LENGTH
from peers import PlainParts, mean_loss

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.stages import Stages
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=1, hidden=16, heads=2, ffn=32, vocabulary=17)
MICROBATCHES, ROUNDS, SHARE = 32, 40, 0.05


def measure() -> dict[str, float]:
    """Microseconds of a forward and of a backward, by recompute policy, and of plain modules."""
    took: dict[str, list[float]] = {}
    tokens = torch.zeros(MICROBATCHES, LENGTH, dtype=torch.int64)
    schedule = build_schedule("1f1b", ranks=1, layers=1, microbatches=MICROBATCHES)
    pipelines = {policy: Pipeline(Decoder(SHAPE), schedule, recompute=policy) for policy in ("none", "selective")}
    plain, one = PlainParts(SHAPE, range(1)), tokens[:1]
    run, at = Stages.run, ""

    def noted(name: str, function: Callable[..., Any], *args: Any) -> Any:
        begun = time.perf_counter()
        made = function(*args)
        took.setdefault(name, []).append(time.perf_counter() - begun)
        return made

    with mock.patch.object(Stages, "run", lambda self, action: noted(f"{at} {action.kind.value}", run, self, action)):
        for _ in range(ROUNDS):
            for policy, pipeline in pipelines.items():
                at = policy
                pipeline.step(tokens, tokens)
            for _ in range(MICROBATCHES):
                loss = noted("plain F", lambda: mean_loss(plain(one), one))
                noted("plain B", loss.backward)
    for pipeline in pipelines.values():
        pipeline.close()
    return {name: sorted(each)[int(len(each) * SHARE)] * 1e6 for name, each in took.items()}
