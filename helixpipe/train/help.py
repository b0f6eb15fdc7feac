"""`helixpipe train --help`: every key with its meaning and default, from the config's own docstrings."""

from __future__ import annotations

import contextlib

import tyro

from helixpipe.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)

_DEFAULTS = Config()
_DESCRIPTION = """\
Train a model under a pipeline schedule. The config file is TOML with a key per option below, as key = value \
under [section]; options on the command line go before it. Starts its ranks itself; under torchrun it joins them. \
--resume alone continues the newest good checkpoint of the run folder, --resume PATH that of another run or one \
checkpoint of it. Without a config file, the config saved with it holds, and options go before it; with one, nothing of \
the saved config does."""


def show_help() -> int:
    """Print the help; 0."""
    with contextlib.suppress(SystemExit):
        tyro.cli(_keys, prog="helixpipe train", description=_DESCRIPTION, args=["--help"], use_underscores=True)
    return 0


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
