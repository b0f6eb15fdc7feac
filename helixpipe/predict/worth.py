"""Worth: what a step comes to for whoever pays for it, and where its seconds go.

step = attention + other products + what is computed again + messages that nothing hides + waiting + sums of gradients
       |------------------------------- mean of all ranks --------------------------------------|
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from helixpipe.predict.cost import action_seconds
from helixpipe.predict.estimate import Estimate, Setting
from helixpipe.predict.hardware import named_link
from helixpipe.predict.holding import Holding, holding
from helixpipe.predict.sums import Costs

_FREE = named_link("free")


class Bytes(NamedTuple):
    """Of the fullest accelerator, at its fullest moment."""

    weights: int
    gradients: int
    optimizer: int
    kept: int
    messages: int
    workspace: int


@dataclass(frozen=True)
class Worth:
    """`seconds`: where the mean rank's step goes, by reason."""

    tokens_per_s: float
    """Of each accelerator."""
    model_flops_utilisation: float
    fullest: int
    bytes: Bytes
    seconds: dict[str, float]
    holding: Holding | None

    def accelerator_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_s / 3600


def worth(estimate: Estimate, sequence_flops: float) -> Worth:
    """Of a step priced. `sequence_flops`: the model's own of one sequence, forward and backward, as a run's log counts them.

    Utilisation is of the accelerator's peak; 0 where there is none (measured costs).
    """
    setting, ranks = estimate.setting, len(estimate.schedule.ranks)
    accelerators = ranks * setting.group * setting.data_parallel
    timeline = estimate.timeline
    fullest = max(range(ranks), key=lambda rank: timeline.peak_bytes[rank])
    point = max(timeline.memory[fullest], key=lambda each: each.activation_bytes)
    held = Bytes(*timeline.standing[fullest], *point[1:])
    peak = accelerators * setting.accelerator.rate(setting.keeping.element_bytes)
    done = sequence_flops * setting.microbatch_size * estimate.schedule.microbatches * setting.data_parallel
    used = 0.0 if setting.profile else done / (estimate.step_s * peak)
    tokens_per_s = estimate.tokens_per_s / accelerators
    return Worth(tokens_per_s, used, fullest, held, _seconds(estimate), holding(estimate))


def _seconds(estimate: Estimate) -> dict[str, float]:
    """Seconds of the mean rank by reason; they add up to the step."""
    setting, program = estimate.setting, estimate.program
    ranks = len(estimate.schedule.ranks)
    bare = setting if setting.profile else replace(setting, nodes=None, tensor_link=None, link=_FREE)
    seconds = action_seconds(estimate.schedule, setting.shape, program.batches, bare.costs, setting.keeping)
    computed_s = math.fsum(seconds(action) for order in estimate.schedule.ranks for action in order) / ranks
    attention_s, other_s = _once(bare, estimate)
    busy_s = sum(estimate.timeline.busy_s) / ranks
    end_s = estimate.step_s - estimate.reduction_s
    return {
        "attention": attention_s,
        "other layers and head": other_s,
        "computed again": computed_s - attention_s - other_s,
        "messages that nothing hides": busy_s - computed_s,
        "waiting in the pipeline": end_s - busy_s,
        "sums of gradients": estimate.reduction_s,
    }


def _once(bare: Setting, estimate: Estimate) -> tuple[float, float]:
    """Attention and all else, each forward and backward once, of the mean rank."""
    costs = Costs(bare, estimate.program.batches[0])
    attention: list[float] = []
    other: list[float] = []
    for part in bare.shape.chain():
        (attention if bare.shape.about(part).attends else other).append(costs.once_s(part))
    times = estimate.schedule.microbatches / len(estimate.schedule.ranks)
    return math.fsum(attention) * times, math.fsum(other) * times
