"""What a config's values must be: each by itself, and together. Every fault is one line that names its key."""

from __future__ import annotations

import dataclasses
import math
import sys

from helixpipe.config import Config, TrainConfig
from helixpipe.config_data import DataConfig
from helixpipe.errors import ConfigError
from helixpipe.parts.shape import ModelShape

# key -> the least it may be
_AT_LEAST = {
    "data.held_out": 0, "data.look_ahead": 1, "train.steps": 1, "train.microbatch_size": 1, "train.batch_size": 1, "train.sequence_length": 1, "train.seed": 0,
    "train.learning_rate": 0, "train.min_learning_rate": 0, "train.warmup_steps": 0, "train.decay_steps": 1, "train.z_loss": 0, "train.weight_decay": 0,
    "train.mask_token": 0, "train.clip_norm": 0, "train.nonfinite_limit": 0, "train.evaluate_every": 0, "train.evaluate_sequences": 1, "runtime.mlp_chunk": 0,
    "runtime.head_chunk": 0, "runtime.port": 0, "runtime.threads": 1, "run.checkpoint_every": 0, "run.keep": 1,
    "run.checkpoint_minutes": 0, "run.keep_every": 0, "run.keep_hours": 0, "run.timeline_step": 0, "run.profile_step": 0, "schedule.segment_multiple": 1, "mesh.dp": 1, "mesh.cp": 1, "mesh.tp": 1,
}  # fmt: skip
# objective -> which of MASK_KEYS it has
OBJECTIVES = {
    "next_token": (),
    "masked": ("mask_share", "mask_replace", "mask_token"),
    "masked_diffusion": ("mask_token",),
}
MASK_KEYS = OBJECTIVES["masked"]
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_AT_MOST = {"train.seed": 2**63 - 1, "runtime.port": 65535, "runtime.timeout_s": 10**8}


def check_config(config: Config) -> None:
    """Raise ConfigError for a value, or a combination of values, that cannot be."""
    _check_values(config)
    _check_together(config)


def _check_values(config: Config) -> None:
    sections = dataclasses.asdict(config).items()
    values = {f"{name}.{key}": value for name, keys in sections for key, value in keys.items() if value is not None}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {value} will not do; give a finite number")
        if name in _AT_LEAST and value < _AT_LEAST[name]:
            raise ConfigError(f"{name}: {value}; give at least {_AT_LEAST[name]}")
        if name in _AT_MOST and value > _AT_MOST[name]:
            raise ConfigError(f"{name}: {value}; give at most {_AT_MOST[name]}")
    if not config.data.held_out < 1:
        raise ConfigError(f"data.held_out: {config.data.held_out}; give a share below 1, such as 0.1")
    if not config.runtime.timeout_s > 0:
        raise ConfigError(f"runtime.timeout_s: {config.runtime.timeout_s}; give more than 0")
    if not 0 <= config.schedule.evenness <= 1:
        raise ConfigError(f"schedule.evenness: {config.schedule.evenness:g}; give 0 (computation-wise) to 1 (even)")
    if config.run.profile_step > config.train.steps:
        raise ConfigError(
            f"run.profile_step: {config.run.profile_step} comes after the last step, train.steps {config.train.steps}; lower it"
        )
    if len(set(config.run.log)) < len(config.run.log):
        raise ConfigError(f"run.log: {', '.join(config.run.log)}; name each once")
    for beta in config.train.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"train.betas: {beta}; give two numbers from 0 to below 1")


def _check_together(config: Config) -> None:
    """What no single key can be blamed for without the others."""
    if config.model.name and config.model.path:
        raise ConfigError(
            f"model.path: '{config.model.path}', and model.name is '{config.model.name}'; leave one of them out"
        )
    train, shape = config.train, config.shape()
    lengths = config.segment_lengths(config.build_schedule()) or (train.sequence_length,)
    config.mesh_shape().check(shape, lengths)
    _check_objective(train, shape)
    shape.check_length(train.sequence_length)
    _check_rates(train)
    _check_adamw(train, config.runtime.dtype)
    check_packing(config.data, train.sequence_length)


def _check_objective(train: TrainConfig, shape: ModelShape) -> None:
    masks, share, replace = OBJECTIVES[train.objective], train.mask_share, train.mask_replace
    for key in MASK_KEYS:
        if getattr(train, key) is not None and key not in masks:
            having = " or ".join(name for name, keys in OBJECTIVES.items() if key in keys)
            raise ConfigError(f"train.{key}: {train.objective} has no such key, {having} has; remove it")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"train.mask_share: {share:g}; give a share above 0 and at most 1, such as 0.15")
    if replace is not None and not (min(replace) >= 0 and math.isclose(sum(replace), 1, rel_tol=1e-6)):
        raise ConfigError(
            f"train.mask_replace: {', '.join(f'{each:g}' for each in replace)}; give three shares, none below 0, that add up to 1"
        )
    if train.objective == "next_token" and not shape.causal:
        raise ConfigError(
            "model.causal: false, and a bidirectional model sees the token that next_token asks for; set train.objective to "
            "masked or masked_diffusion, or model.causal to true"
        )
    if train.objective != "next_token" and shape.causal:
        raise ConfigError(
            f"train.objective: {train.objective} asks for tokens from both sides, and the model is causal; set model.causal to "
            "false, or train.objective to next_token"
        )


def _check_rates(train: TrainConfig) -> None:
    lowest, decay = train.min_learning_rate, train.decay_steps
    if (lowest or 0) > train.learning_rate:
        raise ConfigError(
            f"train.min_learning_rate: {lowest} is above train.learning_rate {train.learning_rate}; lower it"
        )
    if lowest is not None and train.schedule == "constant":
        raise ConfigError("train.min_learning_rate: a constant schedule never falls; remove the key")
    if decay is not None and train.schedule != "wsd":
        raise ConfigError(f"train.decay_steps: {train.schedule} has no such key, wsd has; remove it")
    if decay is not None and decay > train.steps:
        raise ConfigError(f"train.decay_steps: {decay} are more than train.steps {train.steps}; lower it")


def _check_adamw(train: TrainConfig, dtype: str) -> None:
    """AdamW's factors of a step are numbers of the weights' precision."""
    most, name = (sys.float_info.max, dtype) if dtype == "float64" else (_FLOAT32_MAX, "float32")
    if train.learning_rate / (1 - train.betas[0]) > most:
        raise ConfigError(
            f"train.learning_rate: {train.learning_rate:g}, of which AdamW's first step takes {1 / (1 - train.betas[0]):g} times as "
            f"much, and {name} ends at {most:.3g}; lower it"
        )


def check_packing(data: DataConfig, length: int) -> None:
    """Raise ConfigError where sequences of so many tokens cannot be packed so."""
    if data.packing != "windows" and length < 2:
        raise ConfigError(
            f"train.sequence_length: {length}, and data.packing {data.packing} needs at least 2; raise it"
        )
    if data.packing == "balanced" and not data.masks_documents:
        raise ConfigError(
            "data.document_mask: false, and then all sequences cost the same and nothing is to be balanced; "
            "set data.packing to documents or leave the mask"
        )
