"""Weights & Biases: one run of theirs for one run folder, which keeps the run's id in wandb.json.

WANDB_MODE=offline writes to <run>/wandb alone, for `wandb sync`; WANDB_PROJECT, WANDB_NAME, WANDB_API_KEY and the others hold too.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from helixpipe.config_text import to_table
from helixpipe.files import write_text
from helixpipe.train.job import Job

# it gives up meeting its server after so long, and sending what is left at the end of a run: `wandb sync` can send that later
_MEET_S, _FINISH_S = 20.0, 8.0


class WeightsAndBiases:
    def __init__(self, job: Job) -> None:
        self._kept = job.folder / "wandb.json"
        # W&B takes no step twice, so what it was told of an earlier course stays
        run_id, self._told_until = _kept(self._kept)
        self._step = self._told_until
        wandb = import_module("wandb")
        # silent: it neither asks for a key on a terminal nor writes between the lines of the run
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_MEET_S, finish_timeout=_FINISH_S, finish_timeout_raises=True
        )
        wandb.setup(settings=settings)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "helixpipe"),
            name=os.environ.get("WANDB_NAME", job.folder.name),
            dir=str(job.folder),
            config=to_table(job.config),
            id=run_id,
            resume="allow",
            settings=settings,
        )
        self.told = str(job.folder / "wandb") if self._run.offline else str(self._run.url)
        self._keep(run_id)
        self._id = run_id

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._told_until:
            self._run.log(dict(numbers), step=step)
            self._step = step

    def flush(self) -> None:
        self._keep(self._id)

    def close(self) -> None:
        self._keep(self._id)
        self._run.finish()

    def _keep(self, run_id: str) -> None:
        write_text(self._kept, json.dumps({"id": run_id, "step": self._step}) + "\n")


def _kept(path: Path) -> tuple[str, int]:
    """The id of the folder's run, and the last step that it was told; a new id where none can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["id"]), int(found["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return secrets.token_hex(4), -1


def open_sink(job: Job) -> WeightsAndBiases:
    return WeightsAndBiases(job)
