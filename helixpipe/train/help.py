"""`helixpipe train --help`, `evaluate --help`: every key with its meaning and default, from the config's own docstrings."""

from __future__ import annotations

import contextlib

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from helixpipe.config import (
    Config,
    MeshConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from helixpipe.config_data import DataConfig, Sources
from helixpipe.train.stop import STOPPED

_DEFAULTS = Config()
_KINDS = ConstructorRegistry()
_OF_RESUME = """\
Without a config file, the config saved with it holds, and options go before it; with one, nothing of the saved config does."""
_DESCRIPTION = {
    "train": f"""\
Train a model under a pipeline schedule. The config file is TOML with a key per option below, as key = value \
under [section]; options on the command line go before it. Starts its ranks itself; under torchrun it joins them. \
--resume alone continues the newest good checkpoint of the run folder, or starts where there is none, so that one command \
does both; --resume PATH continues that of another run or one checkpoint of it. {_OF_RESUME} \
SIGTERM, SIGUSR1 and Ctrl-C end a run after its step, with a checkpoint and exit code {STOPPED}; a second Ctrl-C ends it at once.""",
    "evaluate": f"""\
Tell the loss of a checkpoint on held-out data, in all and by position in the sequence, under any schedule and mesh: \
--resume PATH is a run folder or one of its checkpoints, --resume alone the newest run's; without it, --model.path is a Hugging Face folder. {_OF_RESUME} --json prints one JSON \
object and nothing else. The same weights give the same loss under any layout: train.evaluate_sequences of \
train.sequence_length tokens are evaluated, spread evenly over the data held out. Nothing is written. Keys of training have no \
effect.""",
}


def show_help(command: str) -> int:
    """Print the help of `train` or `evaluate`; 0."""
    with contextlib.suppress(SystemExit):
        tyro.cli(
            _keys, prog=f"helixpipe {command}", description=_DESCRIPTION[command], args=["--help"], use_underscores=True,
            registry=_KINDS, config=(tyro.conf.FlagConversionOff,),
        )  # fmt: skip
    return 0


@_KINDS.primitive_rule
def _of_sources(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """What tyro takes for one value, since the command line has it as one."""
    if kind.type != Sources:
        return None
    return PrimitiveConstructorSpec(1, "PATH", "".join, lambda value: isinstance(value, str), lambda value: [value])


@_KINDS.primitive_rule
def _of_truth(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | None] | None:
    """As a config and the command line spell it."""
    if kind.type not in (bool, bool | None):
        return None
    return PrimitiveConstructorSpec(
        1, "{true,false}", lambda words: words[0] == "true", lambda value: value in (True, False, None), _spelt
    )


def _spelt(value: bool | None) -> list[str]:
    return [str(value) if value is None else str(value).lower()]


def _keys(
    config: tyro.conf.Positional[str] = "",
    *,
    model: ModelConfig = _DEFAULTS.model,
    schedule: ScheduleConfig = _DEFAULTS.schedule,
    mesh: MeshConfig = _DEFAULTS.mesh,
    data: DataConfig = _DEFAULTS.data,
    train: TrainConfig = _DEFAULTS.train,
    runtime: RuntimeConfig = _DEFAULTS.runtime,
    run: RunConfig = _DEFAULTS.run,
) -> None:
    """The command as tyro sees it.

    Args:
        config: A TOML file; the defaults hold for what it leaves out.
        model: The model.
        schedule: The schedule.
        mesh: The ranks beside the pipeline's.
        data: The data.
        train: The training.
        runtime: The runtime.
        run: The run folder.
    """
