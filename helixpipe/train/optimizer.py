"""AdamW with weight decay on matrices alone, and a learning rate that is a function of the step; torch's fused kernel.

Frozen parameters and buffers are not updated, and are in the state all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from helixpipe.config import TrainConfig
from helixpipe.runtime.shards import Shards

_MOMENTS = ("exp_avg", "exp_avg_sq")
UPDATES = "updates."
"""Before a parameter's name: how many updates it had, which corrects its moments. Checkpoints of old have none."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 0, 1, ...: a straight rise over the warm-up, then the schedule down to the lowest at the last step.

    cosine, linear   from the highest right after the warm-up
    constant         the highest all along
    wsd              the highest until the last `decay_steps`, then by as much less each step
    """
    lowest = config.learning_rate / 10 if config.min_learning_rate is None else config.min_learning_rate
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = min((step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1), 1.0)
    match config.schedule:
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            height = 1 - done
        case "constant":
            height = 1.0
        case "wsd":
            decay = config.decay_steps or max(config.steps // 10, 1)
            height = min(max((config.steps - 1 - step) / decay, 0.0), 1.0)
    return lowest + height * (config.learning_rate - lowest)


class Optimizer:
    """The optimizer of one rank's masters, and its state by parameter name."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        as_whole: Callable[[str, Tensor], Tensor] = lambda name, mine: mine,
        shards: Shards | None = None,
        buffers: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        """`as_whole`: how checkpoints see a tensor of a parameter of which this rank has a part. `shards`: of the
        parameters, those to update here; None is all that are trained. `buffers`: what else is in a checkpoint.
        """
        self.parameters, self.config, self.as_whole, self.buffers = dict(parameters), config, as_whole, buffers
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.shards, self.updated = shards, shards.mine if shards is not None else trained
        matrices = [p for p in self.updated.values() if p.dim() > 1]
        vectors = [p for p in self.updated.values() if p.dim() <= 1]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if params
        ]
        # a rank may own nothing when there are more ranks than blocks
        self._adamw = (
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True) if groups else None
        )

    def step(self, step: int) -> float:
        """Apply the gradients of training step `step`; the learning rate it used."""
        rate = learning_rate(self.config, step)
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
        if self.shards is not None:
            self.shards.share()
        return rate

    def state(self, updates: int = 0) -> dict[str, Tensor]:
        """This rank's weights, buffers and moments, and how often each was updated, by names that know no placement.

        The tensors are the model's and the optimizer's own: filling them restores both. `updates`: of a parameter that had
        none here, where a checkpoint does not tell.
        """
        found = {f"model.{name}": buffer for name, buffer in self.buffers().items()}
        for name, parameter in self.parameters.items():
            found[f"model.{name}"] = self.as_whole(name, parameter.data)
            if name not in self.updated:
                continue
            moments = self._moments(parameter, updates)
            found |= {f"optimizer.{name}.{key}": self.as_whole(name, moments[key]) for key in _MOMENTS}
            found[f"{UPDATES}{name}"] = moments["step"]
        return found

    def _moments(self, parameter: nn.Parameter, updates: int) -> dict[str, Tensor]:
        assert self._adamw is not None
        moments: dict[str, Tensor] = self._adamw.state[parameter]
        for key in _MOMENTS:
            moments.setdefault(key, torch.zeros_like(parameter.data))
        if "step" not in moments:
            moments["step"] = torch.tensor(float(updates), device=parameter.device)
        return moments
