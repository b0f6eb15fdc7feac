"""Replicas: `mesh.dp = "auto"` is as many as the ranks that were started allow, and `train.batch_size` keeps a step's batch.

    ranks started = schedule.ranks x dp x mesh.cp x mesh.tp             decides dp
    train.batch_size = schedule.microbatches x train.microbatch_size x dp     decides schedule.microbatches

So a run goes on in a smaller or larger world with the same sequences a step. A config that is built has numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helixpipe.config import MeshConfig, ScheduleConfig, TrainConfig
from helixpipe.errors import ConfigError

Table = dict[str, dict[str, Any]]
# what divides a batch: where one of them is given anew, micro-batches are counted anew
_DIVIDING = (("mesh", "dp"), ("train", "batch_size"), ("train", "microbatch_size"))


def spread(table: Table, ranks: int | None) -> Table:
    """The table with numbers for both. `ranks`: how many were started, None when as many as the config says will be; auto is
    one replica then. Raises ConfigError for ranks or batches that do not divide.
    """
    found = {section: dict(keys) for section, keys in table.items()}
    mesh, schedule, train = (found.setdefault(section, {}) for section in ("mesh", "schedule", "train"))
    is_auto, total = mesh.get("dp") == "auto", train.get("batch_size")
    if is_auto and total is None:
        raise ConfigError(
            "mesh.dp: auto, and then a step would have as many sequences as ranks allow; set train.batch_size to how many it has"
        )
    if is_auto:
        mesh["dp"] = _replicas(mesh, schedule, ranks)
    size, replicas = train.get("microbatch_size", TrainConfig.microbatch_size), mesh.get("dp", MeshConfig.dp)
    if total is None or min(total, size, replicas) < 1:
        return found  # the last is told with all that is below its least
    microbatches, rest = divmod(total, size * replicas)
    if rest or not microbatches:
        raise ConfigError(
            f"train.batch_size: {total} sequences do not divide over mesh.dp {replicas} with micro-batches of {size}; "
            f"give a multiple of {size * replicas}" + (", or start other ranks" if is_auto else "")
        )
    if schedule.setdefault("microbatches", microbatches) != microbatches:
        raise ConfigError(
            f"train.batch_size: {total}, and schedule.microbatches {schedule['microbatches']} of {size} on mesh.dp {replicas} are "
            f"{schedule['microbatches'] * size * replicas} sequences; leave one of the two out"
        )
    return found


def counted_anew(base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    """Whether `over` divides the batch of a config in another way, so that micro-batches of `base` do not hold for it."""
    has_batch = any("batch_size" in each.get("train", {}) for each in (base, over))
    divides = any(key in over.get(section, {}) for section, key in _DIVIDING)
    return has_batch and divides and "microbatches" not in over.get("schedule", {})


def _replicas(mesh: Mapping[str, Any], schedule: Mapping[str, Any], ranks: int | None) -> int:
    pp, cp, tp = (
        schedule.get("ranks", ScheduleConfig.ranks),
        mesh.get("cp", MeshConfig.cp),
        mesh.get("tp", MeshConfig.tp),
    )
    each = pp * cp * tp
    if ranks is None or min(pp, cp, tp) < 1:
        return 1
    if ranks % each or ranks < each:
        raise ConfigError(
            f"mesh.dp: auto, and torchrun started {ranks} processes, which are no whole replicas of schedule.ranks {pp} x "
            f"mesh.cp {cp} x mesh.tp {tp}; start a multiple of {each}"
        )
    return int(ranks // each)
