"""The optimizer is torch's AdamW with a learning rate by step, and its state survives a checkpoint bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from helixpipe.config import Config, TrainConfig
from helixpipe.train.checkpoint import Checkpoints
from helixpipe.train.optimizer import Optimizer, learning_rate

CONFIG = TrainConfig(steps=20, warmup_steps=4, learning_rate=1.0, min_learning_rate=0.1)


def test_the_learning_rate_rises_then_follows_a_cosine() -> None:
    rates = [learning_rate(CONFIG, step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4 + 15 // 2] == pytest.approx(0.1 + 0.9 / 2, abs=0.05)


def test_the_lowest_is_a_tenth_when_unset() -> None:
    assert learning_rate(TrainConfig(steps=20, warmup_steps=4), 19) == pytest.approx(TrainConfig().learning_rate / 10)


# step by step, by hand: 2 of warm-up to 1.0, 8 more, down to 0.2
BY_HAND = {
    "linear": [0.5, 1.0, 1.0, 1 - 0.8 / 7, 1 - 1.6 / 7, 1 - 2.4 / 7, 1 - 3.2 / 7, 1 - 4.0 / 7, 1 - 4.8 / 7, 0.2],
    "constant": [0.5] + [1.0] * 9,
    "wsd": [0.5] + [1.0] * 5 + [0.8, 0.6, 0.4, 0.2],
}


@pytest.mark.parametrize("schedule", BY_HAND)
def test_the_other_schedules(schedule: str) -> None:
    keys = {"min_learning_rate": 0.2} if schedule != "constant" else {}
    keys |= {"decay_steps": 4} if schedule == "wsd" else {}
    config = TrainConfig(steps=10, warmup_steps=2, learning_rate=1.0, schedule=schedule, **keys)  # type: ignore[arg-type]
    assert [learning_rate(config, step) for step in range(10)] == pytest.approx(BY_HAND[schedule], rel=1e-15)


def test_what_wsd_takes_when_unset() -> None:
    """A tenth of the steps, and of the learning rate; a warm-up that reaches into them is not cut short."""
    config = TrainConfig(steps=30, warmup_steps=2, learning_rate=1.0, schedule="wsd")
    assert [learning_rate(config, step) for step in range(26, 30)] == pytest.approx([1.0, 0.7, 0.4, 0.1])
    late = dataclasses.replace(config, warmup_steps=29)
    assert [learning_rate(late, step) for step in (27, 28, 29)] == pytest.approx([28 / 29, 1.0, 0.1])


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs_have_a_learning_rate(steps: int) -> None:
    for warmup, schedule in itertools.product((0, 1, 5), ("cosine", *BY_HAND)):
        config = TrainConfig(steps=steps, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
        assert all(0 < learning_rate(config, step) <= config.learning_rate for step in range(steps))


def _parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 4, generator=generator)),
        "vector": nn.Parameter(torch.randn(4, generator=generator)),
    }


def _step(parameters: dict[str, nn.Parameter], optimizer: Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(step)


def test_only_matrices_decay() -> None:
    parameters = _parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(parameters, TrainConfig(warmup_steps=0, learning_rate=0.5, weight_decay=0.1)).step(0)
    assert torch.allclose(parameters["matrix"], before["matrix"] * 0.95)
    assert torch.equal(parameters["vector"], before["vector"])


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    straight = _parameters()
    optimizer = Optimizer(straight, CONFIG)
    for step in range(3):
        _step(straight, optimizer, step)
    saved = {name: tensor.clone() for name, tensor in optimizer.state(3).items()}
    for step in range(3, 6):
        _step(straight, optimizer, step)

    resumed = {name: nn.Parameter(torch.zeros_like(p)) for name, p in _parameters().items()}
    restored = Optimizer(resumed, CONFIG)
    for name, tensor in restored.state(3).items():
        tensor.copy_(saved[name])
    for step in range(3, 6):
        _step(resumed, restored, step)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_state_names_know_no_placement() -> None:
    assert sorted(Optimizer(_parameters(), CONFIG).state(0)) == [
        "model.matrix", "model.vector",
        "optimizer.matrix.exp_avg", "optimizer.matrix.exp_avg_sq",
        "optimizer.vector.exp_avg", "optimizer.vector.exp_avg_sq", "updates.matrix", "updates.vector",
    ]  # fmt: skip


def _sparse(parameters: dict[str, nn.Parameter], optimizer: Optimizer, step: int) -> None:
    """The vector has a gradient at every third step alone."""
    generator = torch.Generator().manual_seed(step + 1)
    for name, parameter in parameters.items():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if name == "matrix" or step % 3 == 1 else None
    optimizer.step(step)


@pytest.mark.parametrize("first", [1, 3, 4])
def test_saving_leaves_the_count_of_updates_of_a_parameter_that_lacked_a_gradient(first: int) -> None:
    """Guards against a save that set it to that of all, which changed the run's own next update."""
    straight = _parameters()
    optimizer = Optimizer(straight, CONFIG)
    for step in range(9):
        _sparse(straight, optimizer, step)

    saved = _parameters()
    optimizer = Optimizer(saved, CONFIG)
    for step in range(first):
        _sparse(saved, optimizer, step)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    for step in range(first, 9):
        _sparse(saved, optimizer, step)

    resumed = {name: nn.Parameter(torch.zeros_like(p)) for name, p in _parameters().items()}
    optimizer = Optimizer(resumed, CONFIG)
    for name, tensor in optimizer.state(first).items():
        tensor.copy_(state[name])
    for step in range(first, 9):
        _sparse(resumed, optimizer, step)
    for name, parameter in straight.items():
        assert torch.equal(saved[name], parameter), name
        assert torch.equal(resumed[name], parameter), name


def test_a_checkpoint_without_counts_gives_every_parameter_that_of_all(tmp_path: Path) -> None:
    """As checkpoints were once."""
    optimizer = Optimizer(_parameters(), CONFIG)
    old = {name: tensor for name, tensor in optimizer.state().items() if not name.startswith("updates.")}
    path = Checkpoints(tmp_path, 1, None).save(old, 5, Config())
    restored = Optimizer(_parameters(), CONFIG)
    state = restored.state(5)
    Checkpoints(tmp_path, 1, None).load(path, state)
    assert [float(state[f"updates.{name}"]) for name in ("matrix", "vector")] == [5.0, 5.0]


def test_the_update_is_adamw_s() -> None:
    """Torch's own, one parameter after the other, to rounding."""
    mine, theirs = _parameters(), _parameters()
    optimizer = Optimizer(mine, CONFIG)
    groups = [{"params": [theirs["matrix"]], "weight_decay": CONFIG.weight_decay}, {"params": [theirs["vector"]]}]
    plain = torch.optim.AdamW(groups, betas=CONFIG.betas, weight_decay=0.0, foreach=False, fused=False)
    for step in range(5):
        _step(mine, optimizer, step)
        for name, parameter in theirs.items():
            parameter.grad = mine[name].grad
        for group in plain.param_groups:
            group["lr"] = learning_rate(CONFIG, step)
        plain.step()
    for name, parameter in mine.items():
        assert torch.allclose(parameter, theirs[name], rtol=1e-6, atol=1e-7), name


def test_a_rank_that_owns_nothing_steps_too() -> None:
    optimizer = Optimizer({}, CONFIG)
    assert optimizer.step(0) == 0.25
    assert optimizer.state(1) == {}
