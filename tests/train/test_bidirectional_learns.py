"""A small bidirectional model learns to fill in masked bytes of real text, alike on one rank and under helix two-fold on two."""

from __future__ import annotations

import html.entities
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import plain_logits
from ranks import Ranks
from torch import Tensor

from helixpipe.config import Config
from helixpipe.config_text import build_config
from helixpipe.train.data import open_corpus
from helixpipe.train.held_out import held_out_losses, tensors
from helixpipe.train.objective import Objective
from helixpipe.train.start import make_pipeline

STEPS, RATE = 60, 0.01
ALONE: dict[str, Any] = {"schedule": {"family": "1f1b", "ranks": 1, "microbatches": 4}, "size": 8}
HELIX: dict[str, Any] = {
    "schedule": {"family": "helix", "ranks": 2, "microbatches": 4, "folds": 2, "travel": "attention"}, "size": 4,
    "mesh": {"dp": 2},
}  # fmt: skip


def config_of(objective: str, schedule: dict[str, Any], size: int, mesh: dict[str, Any] | None = None) -> Config:
    """The standard library's table of entities, quotes and digits in an order that is soon seen; windows that help to see it."""
    return build_config({
        "model": {
            "layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "causal": False, "window": 3, "rope_base": 10.0,
        },
        "data": {"path": html.entities.__file__},
        "schedule": schedule, "mesh": mesh or {},
        "train": {
            "objective": objective, "mask_token": 255, "sequence_length": 32, "microbatch_size": size,
            "evaluate_sequences": 64,
        },
        "runtime": {"dtype": "float64", "recompute": "none"},
    })  # fmt: skip


def trained(objective: str, layout: dict[str, Any], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """On a rank: losses of all steps and of what is held out at the end, and its parameters."""
    config = config_of(objective, **layout)
    corpus, pipeline, asking = open_corpus(config), make_pipeline(config, "cpu", None), Objective.of(config)
    optimizer = torch.optim.AdamW(pipeline.parameters.values(), RATE, (0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(1, steps + 1):
        pipeline.zero_gradients()
        losses.append(pipeline.step(**tensors(asking.training(corpus.batch(step), step))))
        pipeline.clip_gradients(1.0)
        optimizer.step()
    losses.append(held_out_losses(pipeline, corpus, 64, asking).mean)
    pipeline.close()
    return losses, {name: parameter.detach().clone() for name, parameter in pipeline.parameters.items()}


def test_masked_bytes_are_filled_in_and_two_ranks_learn_the_same(four_ranks: Ranks) -> None:
    """Two pipelines of two ranks share every batch. Well over chance: what a byte of the held-out text is most often."""
    results = four_ranks.run(trained, "masked", HELIX, STEPS, timeout_s=280)
    losses, weights = results[0][0], {name: value for _, mine in results for name, value in mine.items()}
    assert all(each == losses for each, _ in results)
    alone, _ = trained("masked", ALONE, 5)
    assert losses[:5] == pytest.approx(alone[:5], rel=1e-12)
    config = config_of("masked", **ALONE)
    corpus, asking = open_corpus(config), Objective.of(config)
    right = asked = 0
    nats = 0.0
    for batch in asking.held_out(corpus, 64):
        chosen = batch.targets != -100
        logits = plain_logits(config.shape(), weights, torch.from_numpy(batch.tokens))[torch.from_numpy(chosen)]
        truth = torch.from_numpy(batch.targets[chosen])
        right, asked = right + int((logits.argmax(-1) == truth).sum()), asked + len(truth)
        nats += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
    assert losses[-1] == pytest.approx(nats / asked, rel=1e-9), "what it lost is what this model loses"
    _, counts = np.unique(corpus.held_out.read(0, len(corpus.held_out)), return_counts=True)
    chance, entropy = counts.max() / counts.sum(), -sum(p * math.log(p) for p in counts / counts.sum())
    assert right / asked > chance + 0.1
    assert losses[-1] < entropy - 0.3


def test_masked_diffusion_is_the_same_on_two_ranks(four_ranks: Ranks) -> None:
    results = four_ranks.run(trained, "masked_diffusion", HELIX, 4)
    alone, weights = trained("masked_diffusion", ALONE, 4)
    for losses, mine in results:
        assert losses == pytest.approx(alone, rel=1e-12)
        assert all(torch.allclose(value, weights[name], rtol=1e-9, atol=1e-12) for name, value in mine.items())
    assert alone[-1] < math.log(256)
