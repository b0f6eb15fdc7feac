"""The configuration of `helixpipe train`: frozen dataclasses, read strictly from TOML and the command line.

A key is `section.name` everywhere: in a TOML file under `[section]`, on the command line as
`--section.name value`, and in every error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w

from helixpipe.errors import ConfigError, nearest
from helixpipe.schedule import families
from helixpipe.schedule.partition import even, for_shape
from helixpipe.schedule.parts import Part, layer_parts
from helixpipe.schedule.schedule import Schedule
from helixpipe.shape import Batch, ModelShape, named_shape


@dataclass(frozen=True)
class ModelConfig:
    """A shape by name, and any of its fields to change."""

    name: str = "tiny"
    """A shape of helixpipe.shape.SHAPES; the keys below change it."""
    layers: int | None = None
    """Decoder layers."""
    hidden: int | None = None
    """Size of the residual stream."""
    heads: int | None = None
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; 0 is as many as heads."""
    head_dim: int | None = None
    """Size of a head; 0 is hidden / heads."""
    ffn: int | None = None
    """Inner size of the MLP."""
    vocabulary: int | None = None
    """Token ids; bytes of text need 256."""
    norm: Literal["rms", "layer"] | None = None
    """RMSNorm or LayerNorm."""
    norm_eps: float | None = None
    """What the norm adds to the variance."""
    positions: Literal["rope", "learned"] | None = None
    """Rotary or learned positions."""
    rope_base: float | None = None
    """The base of rotary positions."""
    context: int | None = None
    """The longest sequence that learned positions have room for."""
    mlp: Literal["swiglu", "gelu"] | None = None
    """Three matrices with a gate, or two."""
    qkv_bias: bool | None = None
    """Biases of q, k and v."""
    bias: bool | None = None
    """Biases of the other linear layers."""
    qk_norm: bool | None = None
    """RMSNorm on every head's q and k."""
    tied: bool | None = None
    """Whether the head uses the embedding's table."""
    causal: bool | None = None
    """Whether a token attends only to those before it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Which schedule. Options that stay unset are the family's own defaults."""

    family: str = "helix"
    """A published schedule: helix, 1f1b, gpipe, ... (helixpipe.schedule.families)."""
    ranks: int = 2
    """Pipeline ranks: processes, one device each where there are devices."""
    microbatches: int = 4
    """Micro-batches a step; more fill the pipeline better."""
    folds: int | None = None
    """helix: micro-batch groups of folds x ranks; 1 is the naive order, 2 the two-fold."""
    travel: Literal["none", "qkv", "attention"] | None = None
    """helix: what moves with the attention to the rank that runs it."""
    groups: Literal["sequential", "forward_first"] | None = None
    """helix: one group after another (least memory), or all forward first (least bubble)."""
    segments: int | None = None
    """seq1f1b: pieces of a sequence."""
    stages_per_rank: int | None = None
    """interleaved: stages on a rank."""
    group: int | None = None
    """interleaved: micro-batches (or segments of them) that take a stage together; 0 is the fewest that feed all ranks."""
    partition: Literal["computation_wise", "even"] = "computation_wise"
    """How a sequence is cut into segments: of as much computation each, or of as many tokens."""
    segment_multiple: int = 128
    """Segment lengths are multiples of it, the last excepted: kernels like round numbers."""


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    path: str = ""
    """A text file or a folder of them (bytes are tokens), or .npy/.bin tokens; "" is Python's standard library."""
    held_out: float = 0.1
    """The share never trained on: the tail of the tokens; 0 is none."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """What a .bin file holds."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and the optimizer (AdamW, warm-up, cosine)."""

    steps: int = 120
    """Optimizer steps in all."""
    microbatch_size: int = 1
    """Sequences in a micro-batch."""
    sequence_length: int = 1024
    """Tokens in a sequence."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    learning_rate: float = 2e-3
    """At its highest, after the warm-up."""
    min_learning_rate: float | None = None
    """Where the cosine ends; a tenth of learning_rate when unset."""
    warmup_steps: int = 30
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """On matrices alone."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay of the first and second moment."""
    clip_norm: float = 1.0
    """Gradients above this norm, over all ranks, are scaled down to it; 0 is no clipping."""
    evaluate_every: int = 40
    """Steps between evaluations on held-out data; 0 is only the first and the last."""
    evaluate_batches: int = 4
    """Batches in an evaluation, each as large as a training step's."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How a rank computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What parts compute in; weights and optimizer stay float32 (float64 for float64)."""
    recompute: Literal["none", "full", "selective"] = "selective"
    """What a forward does not keep and the backward computes again; selective is all but attention."""
    mlp_chunk: int = 0
    """Tokens at a time through the MLP; 0 is all at once."""
    head_chunk: int = 0
    """Tokens at a time through the head and the loss; 0 is all at once."""
    timeout_s: float = 300.0
    """A wait for another rank that lasts longer is an error."""
    port: int = 0
    """Where local ranks meet; 0 is any free port."""
    threads: int = 1
    """CPU threads of a rank."""


@dataclass(frozen=True)
class RunConfig:
    """The run folder: config.toml, metrics.jsonl, checkpoints/ and timeline.svg."""

    folder: str = ""
    """Where; "" is a new one, runs/<name>-<number>. Ranks on several machines must share it."""
    name: str = ""
    """Of new folders; "" is the config file's name, or 'default'."""
    checkpoint_every: int = 40
    """Steps between checkpoints (the last step has one too); 0 is none."""
    keep: int = 2
    """Checkpoints to keep: the newest ones."""
    resume: str = ""
    """'auto' continues the newest good checkpoint of the run folder; a path, that run's or that checkpoint."""
    timeline_step: int = 10
    """The step that timeline.svg shows; 0 is none."""


@dataclass(frozen=True)
class Config:
    """Everything a run is decided by."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def shape(self) -> ModelShape:
        """The model's shape; raises ConfigError."""
        changes = dataclasses.asdict(self.model)
        name = changes.pop("name")
        return named_shape(name, **{key: value for key, value in changes.items() if value is not None})

    def build_schedule(self) -> Schedule:
        """The schedule, checked; raises ConfigError."""
        asked = self.schedule
        family, ranks, microbatches = asked.family, asked.ranks, asked.microbatches
        given = {key: value for key in _FAMILY_OPTIONS if (value := getattr(asked, key)) is not None}
        for key in given:
            if key not in families.options(family):
                having = [name for name in families.FAMILIES if key in families.options(name)]
                raise ConfigError(
                    f"schedule.{key}: {family} has no such option, {', '.join(having)} has; remove the key"
                )
        shape = self.shape()
        given |= {key: value for key, value in self._work(shape).items() if key in families.options(family)}
        return families.build_schedule(family, ranks=ranks, layers=shape.layers, microbatches=microbatches, **given)

    def _work(self, shape: ModelShape) -> dict[str, tuple[float, ...]]:
        """What families balance by, in FLOPs: embed and head in layers; F, I and W of a layer."""
        batch = Batch(self.train.microbatch_size, (self.train.sequence_length,))
        forward = {part.kind: shape.forward_flops(part, batch, 0) for part in layer_parts(0)}
        backward = sum(shape.backward_flops(part, batch, 0) for part in layer_parts(0))
        layer, attention = sum(forward.values()), forward["attn"]
        again = {"none": 0.0, "full": layer, "selective": layer - attention}[self.runtime.recompute]
        weights = layer - attention  # a W multiplies as much as a linear layer's forward
        head = shape.forward_flops(Part("head", shape.layers), batch, 0)
        return {"ends": (0.0, head / layer), "costs": (layer, backward - weights + again, weights)}

    def segment_lengths(self, schedule: Schedule) -> tuple[int, ...] | None:
        """Tokens of each segment; None when sequences stay whole."""
        length, segments, multiple = self.train.sequence_length, schedule.segments, self.schedule.segment_multiple
        if segments == 1:
            return None
        if self.schedule.partition == "even":
            return even(length, segments, multiple)
        return for_shape(self.shape(), length, segments, multiple, self.runtime.recompute)

    @property
    def batch_size(self) -> int:
        """Sequences in a step."""
        return self.schedule.microbatches * self.train.microbatch_size


Table = dict[str, dict[str, Any]]
"""A config as TOML has it: section -> key -> value, only what was given."""

_FAMILY_OPTIONS = tuple(option.name for option in dataclasses.fields(ScheduleConfig) if option.default is None)
# key -> the least it may be
_AT_LEAST = {
    "data.held_out": 0, "train.steps": 1, "train.microbatch_size": 1, "train.sequence_length": 1, "train.seed": 0,
    "train.learning_rate": 0, "train.min_learning_rate": 0, "train.warmup_steps": 0, "train.weight_decay": 0,
    "train.clip_norm": 0, "train.evaluate_every": 0, "train.evaluate_batches": 1, "runtime.mlp_chunk": 0,
    "runtime.head_chunk": 0, "runtime.port": 0, "runtime.threads": 1, "run.checkpoint_every": 0, "run.keep": 1,
    "run.timeline_step": 0, "schedule.segment_multiple": 1,
}  # fmt: skip
_AT_MOST = {"train.seed": 2**63 - 1, "runtime.port": 65535}


def read_toml(path: str | Path) -> Table:
    """The table in a TOML file, its keys and types checked; raises ConfigError."""
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    return _checked(table, f"{path}: ")


def write_toml(config: Config) -> str:
    """The config as TOML text, every set key spelled out; `read_toml` gives it back."""
    return tomli_w.dumps(to_table(config))


def to_table(config: Config) -> Table:
    """The config's keys that are set."""
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value for key, value in keys.items() if value is not None
        }
        for section, keys in dataclasses.asdict(config).items()
    }


def merged(base: Table, over: Table) -> Table:
    """`base` with the keys of `over` on top. Another family does not inherit the base's family options."""
    found = {section: dict(keys) for section, keys in base.items()}
    family = over.get("schedule", {}).get("family")
    if family is not None and family != found.get("schedule", {}).get("family", ScheduleConfig.family):
        for option in _FAMILY_OPTIONS:
            found.get("schedule", {}).pop(option, None)
    for section, keys in over.items():
        found.setdefault(section, {}).update(keys)
    return found


def build_config(table: Mapping[str, Any]) -> Config:
    """A config from a table; raises ConfigError for a key, type, value or combination that cannot be."""
    table = _checked(table, "")
    sections = {
        name: kind(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in table.get(name, {}).items()}
        )
        for name, kind in _sections().items()
    }
    config = Config(**sections)
    _check_values(config)
    _check_together(config)
    return config


class Arguments(NamedTuple):
    """What stood behind `helixpipe train`."""

    path: str | None
    """The config file."""
    overrides: Table


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """`[config.toml] [--section.key value ...] [--resume [PATH]]`, checked key by key; raises ConfigError."""
    path: str | None = None
    overrides: Table = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            if path is not None:
                raise ConfigError(
                    f"'{word}': one config file is enough, and '{path}' is given; write keys as --section.key value"
                )
            path = word
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == "resume":
            # a checkpoint is a folder: a TOML file after a bare --resume is the config
            bare = not equals and (not waiting or waiting[0].startswith("--") or waiting[0].endswith(".toml"))
            value: Any = "auto" if bare else (text if equals else waiting.pop(0))
            overrides.setdefault("run", {})["resume"] = value
            continue
        section, _, key = name.partition(".")
        kind = _field_type(section, key, "--")
        if not equals and not waiting:
            raise ConfigError(f"--{name}: no value; give {_expected(kind)}")
        words = [text] if equals else [waiting.pop(0)]
        if typing.get_origin(kind) is tuple and "," not in words[0] and not equals and waiting:
            words.append(waiting.pop(0))
        overrides.setdefault(section, {})[key] = _from_text(kind, ",".join(words), f"--{name}")
    return Arguments(path, overrides)


def _sections() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _field_type(section: str, key: str, where: str) -> Any:
    """The type of a key; raises ConfigError with the nearest one."""
    sections = _sections()
    if section not in sections:
        full = [f"{name}.{section}" for name, kind in sections.items() if section in typing.get_type_hints(kind)]
        if full and not key:
            raise ConfigError(f"{where}{section}: a key needs its section; did you mean '{where}{full[0]}'?")
        raise ConfigError(f"{where}{section}: no such section{nearest(section, sections)}")
    hints = typing.get_type_hints(sections[section])
    if key not in hints:
        raise ConfigError(f"{where}{section}.{key}: no such key{nearest(key, hints)}")
    kind = hints[key]
    if typing.get_origin(kind) is types.UnionType or typing.get_origin(kind) is typing.Union:
        kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
    return kind


def _checked(table: Mapping[str, Any], where: str) -> Table:
    """The table with every key known and every value of its type."""
    found: Table = {}
    for section, keys in table.items():
        if section not in _sections():
            raise ConfigError(f"{where}{section}: no such section{nearest(section, _sections())}")
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{where}{section}: a section, not a value; write keys under [{section}]")
        for key, value in keys.items():
            kind = _field_type(section, key, where)
            found.setdefault(section, {})[key] = _typed(kind, value, f"{where}{section}.{key}")
    return found


def _typed(kind: Any, value: Any, where: str) -> Any:
    """The value, when it is of the type; an integer may stand for a float."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            known = nearest(value, choices) if isinstance(value, str) else f"; known: {', '.join(choices)}"
            raise ConfigError(f"{where}: {_shown(value)} is not known{known}")
        return value
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if isinstance(value, (list, tuple)) and len(value) == len(inner):
            return [_typed(each, item, where) for each, item in zip(inner, value, strict=True)]
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: {_shown(value)} will not do; give {_expected(kind)}")


def _from_text(kind: Any, text: str, where: str) -> Any:
    """A value from the command line."""
    try:
        if kind in (int, float):
            return kind(text)
        if typing.get_origin(kind) is tuple:
            return _typed(kind, [float(item) for item in text.split(",")], where)
    except ValueError:
        raise ConfigError(f"{where}: {_shown(text)} will not do; give {_expected(kind)}") from None
    if kind is bool and text in ("true", "false"):
        return text == "true"
    return _typed(kind, text, where)


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{len(typing.get_args(kind))} numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)


def _check_values(config: Config) -> None:
    values = {f"{section}.{key}": value for section, keys in to_table(config).items() for key, value in keys.items()}
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
    for beta in config.train.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"train.betas: {beta}; give two numbers from 0 to below 1")


def _check_together(config: Config) -> None:
    """What no single key can be blamed for without the others."""
    train, shape = config.train, config.shape()
    config.segment_lengths(config.build_schedule())
    if not shape.causal:  # it would see the token it is asked for
        raise ConfigError("model.causal: next-token training needs a causal model; set it to true")
    if shape.positions == "learned" and train.sequence_length > shape.context:
        raise ConfigError(
            f"train.sequence_length: {train.sequence_length} tokens, and learned positions have room for {shape.context}; "
            "shorten it or raise model.context"
        )
    if (train.min_learning_rate or 0) > train.learning_rate:
        raise ConfigError(
            f"train.min_learning_rate: {train.min_learning_rate} is above train.learning_rate {train.learning_rate}; lower it"
        )
