"""TensorBoard: event files in <run>/tensorboard. `tensorboard --logdir runs` shows all runs beside one another."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from helixpipe.train.job import Job


class TensorBoard:
    def __init__(self, job: Job) -> None:
        folder = job.folder / "tensorboard"
        self.told = str(folder)
        # of a run that goes on, TensorBoard hides what an earlier course wrote from here on; of one that starts again, all of it
        purged = job.step + 1 if job.step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purged if folder.exists() else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def open_sink(job: Job) -> TensorBoard:
    return TensorBoard(job)
