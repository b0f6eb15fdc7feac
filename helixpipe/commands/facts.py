"""What several commands tell of a schedule."""

from __future__ import annotations

from helixpipe.schedule.schedule import Schedule


def facts(schedule: Schedule) -> dict[str, int]:
    return {
        "ranks": len(schedule.ranks),
        "stages": len(schedule.stages),
        "layers": schedule.layers,
        "microbatches": schedule.microbatches,
        "actions": sum(map(len, schedule.ranks)),
    }
