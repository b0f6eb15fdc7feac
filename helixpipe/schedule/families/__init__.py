"""One file per published schedule. `build_schedule` finds them by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helixpipe.errors import ConfigError, nearest
from helixpipe.parts.shape import ModelShape, Shaped, shape_of
from helixpipe.schedule.check import check
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.families.breadth_first import breadth_first
from helixpipe.schedule.families.constructed import constructed
from helixpipe.schedule.families.cut_by_cost import cut_by_cost
from helixpipe.schedule.families.dualpipe_v import dualpipe_v
from helixpipe.schedule.families.gpipe import gpipe
from helixpipe.schedule.families.helix import helix
from helixpipe.schedule.families.interleaved import interleaved
from helixpipe.schedule.families.one_f_one_b import one_f_one_b
from helixpipe.schedule.families.seq1f1b import seq1f1b
from helixpipe.schedule.families.seq1f1b_interleaved import seq1f1b_interleaved
from helixpipe.schedule.families.seq1f1b_zb import seq1f1b_zb
from helixpipe.schedule.families.slimpipe import slimpipe
from helixpipe.schedule.families.split import cut_layers
from helixpipe.schedule.families.terapipe import terapipe
from helixpipe.schedule.families.v_half import v_half
from helixpipe.schedule.families.v_min import v_min
from helixpipe.schedule.families.zb_h1 import zb_h1
from helixpipe.schedule.families.zb_h2 import zb_h2
from helixpipe.schedule.families.zb_v import zb_v
from helixpipe.schedule.problem import Kept
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.vocabulary import VOCABULARIES, Prices, check_words, spread

FAMILIES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "breadth_first": breadth_first,
    "zb_h1": zb_h1,
    "zb_h2": zb_h2,
    "zb_v": zb_v,
    "v_half": v_half,
    "v_min": v_min,
    "dualpipe_v": dualpipe_v,
    "terapipe": terapipe,
    "seq1f1b": seq1f1b,
    "seq1f1b_interleaved": seq1f1b_interleaved,
    "seq1f1b_zb": seq1f1b_zb,
    "slimpipe": slimpipe,
    "helix": helix,
    "constructed": constructed,
}


EVEN_SEGMENTS = ("slimpipe",)
"""Families whose segments are of one length by definition."""


def default_partition(family: str) -> str:
    """How a family's sequences are cut where nothing else is asked for: `even` or `computation_wise`."""
    return "even" if family in EVEN_SEGMENTS else "computation_wise"


def options(family: str) -> tuple[str, ...]:
    """The options of a family beyond ranks, layers and micro-batches."""
    if family not in FAMILIES:
        raise ConfigError(f"schedule.family: '{family}' is not known{nearest(family, FAMILIES)}")
    parameters = inspect.signature(FAMILIES[family]).parameters.values()
    return tuple(each.name for each in parameters if each.kind is not each.KEYWORD_ONLY)[3:]


def build_schedule(
    family: str,
    *,
    ranks: int,
    microbatches: int,
    layers: int = 0,
    model: Shaped | ModelShape | None = None,
    vocabulary: str = "last",
    layers_per_stage: Sequence[int] = (),
    layer_costs: Sequence[float] = (),
    prices: Prices | None = None,
    kept: Kept | None = None,
    like: Schedule | None = None,
    **given: Any,
) -> Schedule:
    """The schedule of a family, checked.

    `vocabulary="spread"` divides embedding and head by words over all ranks, where "last" leaves the head on one (see
    `vocabulary`). `layers_per_stage`: those of each stage, in order, where the family is not to choose, and `layer_costs`
    those of layers that differ, in their mean's, by which it chooses. `prices`: of a
    schedule, what its actions take, by which orders are built where a family has none of its own; some units for each
    kind of part when not given. `kept`: and what its forwards keep, in bytes, where `memory` says how many. `like`: a schedule
    of `constructed` that was built for other costs: the same stages in an order for these ones, found in little time.

    `model` says how many layers there are, and which of them are one block; without one, `layers` does. `given` are the
    family's own options (`options(family)` names them), such as `folds` and `travel` of `helix`; `opaque=True` is all
    layers. Raises ConfigError for a family, option or size that cannot be.
    """
    known = options(family)
    if model is not None:
        shape = shape_of(model)
        if layers not in (0, shape.layers):
            raise ConfigError(f"schedule.layers: {layers}, and the model has {shape.layers}; leave layers away")
        layers = shape.layers
        if shape.opaque:
            given = {"opaque": shape.opaque, **given}
        if vocabulary == "spread":
            check_words(ranks, shape.vocabulary)
    if given.get("opaque") is True:
        given["opaque"] = tuple(range(layers))
    if given.get("opaque") and "opaque" not in known:
        whole = [name for name in FAMILIES if "segments" not in options(name) and "opaque" in options(name)]
        raise ConfigError(
            f"schedule.family: {family} looks inside layers, and layer {min(given['opaque'])} is one opaque block; "
            f"use {', '.join(whole[:-1])} or {whole[-1]}"
        )
    for name in given:
        if name not in known:
            raise ConfigError(f"schedule.{name}: {family} has no such option{nearest(name, known)}")
    if vocabulary not in VOCABULARIES:
        raise ConfigError(f"schedule.vocabulary: '{vocabulary}' is not known; known: {', '.join(VOCABULARIES)}")
    if vocabulary == "spread" and given.get("opaque"):
        raise ConfigError(
            f"schedule.vocabulary: spread divides embedding and head by words, and layer {min(given['opaque'])} is one opaque block: "
            "of a model of somebody's modules nobody knows how; use last"
        )
    for name, number in (("ranks", ranks), ("layers", layers), ("microbatches", microbatches)):
        if number < 1:
            raise ConfigError(f"schedule.{name}: {number}; give at least 1")
    prices = prices or unit_durations
    around = {
        "vocabulary": vocabulary, "layers_per_stage": layers_per_stage, "layer_costs": layer_costs, "prices": prices, "kept": kept,
        "like": like,
    }  # fmt: skip
    parameters = inspect.signature(FAMILIES[family]).parameters
    schedule = FAMILIES[family](
        ranks, layers, microbatches, **given, **{name: value for name, value in around.items() if name in parameters}
    )
    if "layers_per_stage" not in parameters:
        schedule = _cut_anew(family, schedule, layers_per_stage, layer_costs, given)
    if vocabulary == "spread" and "vocabulary" not in parameters:
        schedule = spread(schedule, prices)
    check(schedule)
    return schedule


def _cut_anew(
    family: str, schedule: Schedule, by_hand: Sequence[int], costs: Sequence[float], given: Mapping[str, Any]
) -> Schedule:
    """The same order of stages with other layers in them: given by hand, or by cost where layers differ."""
    if "opaque" not in options(family):
        if by_hand:
            raise ConfigError(
                f"schedule.layers_per_stage: {family} cuts inside layers; leave it out, or use another family"
            )
        return schedule
    count = by_hand
    if costs and not by_hand:
        of_stage = [ranks[0] for ranks in schedule.ranks_of]
        count = cut_by_cost(costs, given.get("ends", (0, 0)), of_stage)
    if not count:
        return schedule
    stages = cut_layers(schedule.layers, count, len(schedule.stages), given.get("opaque", ()))
    return Schedule(stages, schedule.ranks)
