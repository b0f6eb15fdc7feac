"""What a model's parameters are before the first step: drawn from the seed, read from files, or a checkpoint's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helixpipe.config import Config
from helixpipe.errors import ConfigError, HelixpipeError
from helixpipe.hub.adapter import Adapter
from helixpipe.hub.folder import Folder

if TYPE_CHECKING:
    from helixpipe.model.decoder import Decoder
    from helixpipe.schedule.schedule import Schedule


def check_model(config: Config, checkpoint: Path | None) -> None:
    """Raise ConfigError, before any rank starts, for a folder of which not every weight will do. Reads headers alone.

    What is trained can be exported: a change that the folder's architecture has no word for is refused here, not then.
    """
    if not config.model.path:
        return
    folder = Folder.open(config.model.path)
    if checkpoint is None:
        _ = folder.sources
    folder.architecture.write(config.shape(), folder.config)


@contextmanager
def initial_model(config: Config, schedule: Schedule, checkpoint: Path | None) -> Iterator[Decoder]:
    """The config's model, for a pipeline to be made of; rank 0 shows on a terminal how far reading is."""
    from helixpipe.model.decoder import Decoder

    shape, runtime, train = config.shape(), config.runtime, config.train
    if not config.model.path:
        yield Decoder(shape, train.seed, runtime.mlp_chunk, runtime.head_chunk, train.z_loss)
        return
    from helixpipe.hub.load import Loaded

    try:
        folder = Folder.open(config.model.path)
        model = Loaded(
            folder,
            shape,
            runtime.mlp_chunk,
            runtime.head_chunk,
            empty=checkpoint is not None,
            seed=train.seed,
            z_loss=train.z_loss,
            adapter=Adapter.open(config.model.adapter, folder) if config.model.adapter else None,
        )
    except ConfigError as error:  # a fault of this machine alone, which others do not see
        raise HelixpipeError(str(error)) from None
    if model.empty or not sys.stderr.isatty() or _rank() != 0:
        yield model
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    mine = [part for number, stage in enumerate(schedule.stages) if schedule.owner(number) == 0 for part in stage.parts]
    total = sum(shape.tensor_share(config.mesh.tp).parameter_elements(mine).values())
    columns = (
        TextColumn("reading weights"),
        BarColumn(24),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        model.tell = lambda elements: progress.advance(task, elements)
        yield model


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0
