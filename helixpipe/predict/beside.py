"""Beside: what a plan on one mesh tries once its named families are priced: the vocabulary on all ranks, and orders built from costs.

Both take longer to build, so what a bound says cannot be the fastest is not tried; where nothing fits, those that need least are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helixpipe.errors import ConfigError, ScheduleError
from helixpipe.parts.work import Keeping
from helixpipe.predict.bounds import Bound, PolicyBound
from helixpipe.predict.candidates import (
    CONSTRUCTED,
    KEPT_SHARE,
    MOST_BUILT,
    Candidate,
    like,
    setting_of,
    spread,
    together,
)
from helixpipe.predict.estimate import Setting
from helixpipe.predict.layouts import Layout
from helixpipe.predict.refine import placed

MOST_LEAN = 16
"""Tried where nothing fits."""


def beside(
    setting: Setting,
    ranks: int,
    microbatches: int,
    asked: Sequence[Candidate],
    fastest_s: float,
    memory_bytes: float,
) -> list[Candidate]:
    """Of these candidates those that could be the fastest with the vocabulary on all ranks."""
    bounds = _bounds(setting, ranks, microbatches, asked)
    return [each for each, bound in bounds if bound.step_s <= fastest_s and bound.peak_bytes <= memory_bytes]


def leanest(
    setting: Setting, ranks: int, microbatches: int, asked: Sequence[Candidate], memory_bytes: float
) -> list[Candidate]:
    """Those that need least with the vocabulary on all ranks, where a whole one leaves no room: one rank has all of a head then."""
    bounds = sorted(_bounds(setting, ranks, microbatches, asked), key=lambda each: each[1].peak_bytes)
    return [each for each, bound in bounds if bound.peak_bytes <= memory_bytes][:MOST_LEAN]


def _bounds(
    setting: Setting, ranks: int, microbatches: int, asked: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Bound]]:
    """Each with the vocabulary on all ranks, but those that cannot be."""
    layout = Layout(setting.mesh, setting.optimizer, microbatches, setting.microbatch_size)
    policies: dict[Keeping, PolicyBound] = {}
    for candidate in map(spread, asked):
        mine = setting_of(setting, candidate)
        try:
            small = placed(mine, layout, candidate, ranks)
            batch = mine.batch(dict(candidate.options).get("segments", 1))
        except (ConfigError, ScheduleError):
            continue
        policy = policies.setdefault(mine.keeping, PolicyBound(mine, ranks, microbatches))
        yield candidate, policy.of_placement(small, batch, together(candidate, ranks, microbatches))


def built_like(
    candidate: Candidate, microbatches: int, ranks: int, room_bytes: float, only: Sequence[str]
) -> list[Candidate]:
    """An order built for its costs with a candidate's stages, in the room that weights leave; none where it would take minutes."""
    if only and CONSTRUCTED not in only:
        return []
    built = like(candidate, KEPT_SHARE * room_bytes)
    if built is None:
        return []
    options = dict(built.options)
    actions = 2 * microbatches * ranks * options["segments"] * options["stages_per_rank"]
    return list(dict.fromkeys((built, spread(built)))) if actions <= MOST_BUILT else []
