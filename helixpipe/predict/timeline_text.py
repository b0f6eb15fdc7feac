"""Timelines as JSON: what a training run leaves, and `helixpipe compare` reads.

{"spans": [[["0F0", 0.0, 1.5, ""], ...] a rank], "memory": [[[0.0, 1024, 0, 0], ...] a rank], "standing": [[w, g, o] a rank]}
"""

from __future__ import annotations

import json
from pathlib import Path

from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.files import json_text
from helixpipe.predict.timeline import MemoryPoint, Span, Standing, Timeline
from helixpipe.schedule.action import Action


def to_json(timeline: Timeline) -> str:
    """Times to a tenth of a microsecond."""
    spans = [
        [[str(s.action), round(s.start_s, 7), round(s.end_s, 7), s.awaited] for s in rank] for rank in timeline.spans
    ]
    memory = [[[round(p.time_s, 7), *p[1:]] for p in rank] for rank in timeline.memory]
    return json_text({"spans": spans, "memory": memory, "standing": timeline.standing}) + "\n"


def from_json(text: str) -> Timeline:
    """What `to_json` wrote; raises ValueError, TypeError, KeyError or ScheduleError for anything else."""
    data = json.loads(text)
    spans = tuple(
        tuple(Span(Action.parse(a), float(s), float(e), str(w)) for a, s, e, w in rank) for rank in data["spans"]
    )
    memory = tuple(tuple(MemoryPoint(float(t), *map(int, held)) for t, *held in rank) for rank in data["memory"])
    return Timeline(spans, memory, tuple(Standing(*map(int, each)) for each in data["standing"]))


def load(path: Path) -> Timeline:
    """Raises ConfigError that names the file."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a run writes it at step run.timeline_step") from None
    except (ValueError, TypeError, KeyError, ScheduleError):
        raise ConfigError(f"{path}: not a timeline; a run writes one at step run.timeline_step") from None
