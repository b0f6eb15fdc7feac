"""Layers to stages, for the families that cut the chain only at x."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from helixpipe.errors import ConfigError
from helixpipe.parts.part import chain, layer_parts
from helixpipe.schedule.stage import Stage, cut


def split_layers(
    layers: int, ranks: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0), per_rank: int = 1
) -> tuple[Stage, ...]:
    """`per_rank` stages for each rank, runs of whole layers; embed joins the first and head the last.

    `ends` says how many layers' work embed and head are; the heaviest stage is as light as can be. An end
    that weighs something may be a stage of its own. Where that leaves a choice, the middle stages take one
    layer more.
    """
    if len(ends) != 2 or not all(0 <= end < float("inf") for end in ends):
        raise ConfigError(f"schedule.ends: {tuple(ends)}; give two weights in layers, for embed and head, from 0 up")
    if ranks * per_rank > most_stages(layers, ends):
        each = "" if per_rank == 1 else f" of {per_rank} stages each"
        filled = f"{ranks * per_rank} stages" if per_rank == 1 else f"{_count_of(ranks, 'rank')}{each}"
        most = layers // per_rank
        advice = f"use at most {_count_of(most, 'rank')}" if most else f"use a model of at least {per_rank} layers"
        raise ConfigError(f"schedule.ranks: {_count_of(layers, 'layer')} cannot fill {filled}; {advice}")
    odd = next((layer for layer in opaque if not 0 <= layer < layers), None)
    if odd is not None:
        raise ConfigError(f"schedule.opaque: there is no layer {odd}; layers are 0..{layers - 1}")
    return _cut(layers, _count(layers, ranks * per_rank, ends), opaque)


def cut_layers(layers: int, count: Sequence[int], stages: int, opaque: Collection[int] = ()) -> tuple[Stage, ...]:
    """Stages of so many layers each, as somebody says; raises ConfigError where they do not add up."""
    told = ", ".join(map(str, count))
    if len(count) != stages:
        raise ConfigError(
            f"schedule.layers_per_stage: {told} are of {len(count)} stages, and the schedule has {stages}; give each one's"
        )
    if sum(count) != layers:
        raise ConfigError(
            f"schedule.layers_per_stage: {told} add up to {sum(count)}, and the model has {layers} layers; "
            f"give {abs(layers - sum(count))} {'more' if sum(count) < layers else 'fewer'}"
        )
    empty = next((s for s, each in enumerate(count) if each < (0 if s in (0, stages - 1) and stages > 1 else 1)), None)
    if empty is not None:
        raise ConfigError(
            f"schedule.layers_per_stage: {told} give stage {empty} {count[empty]}; only the first and the last may have none, "
            "with embedding or head alone"
        )
    return _cut(layers, count, opaque)


def _cut(layers: int, count: Sequence[int], opaque: Collection[int]) -> tuple[Stage, ...]:
    whole = chain(layers, opaque)
    starts = [sum(count[:s]) for s in range(1, len(count))]
    before = {whole[-1] if at == layers else layer_parts(at, at in opaque)[0] for at in starts}
    return tuple(Stage(parts) for parts in cut(whole, before))


def most_stages(layers: int, ends: Sequence[float]) -> int:
    """How many stages so many layers fill: an end that weighs something may be one without any."""
    return layers + sum(end > 0 for end in ends)


def _count_of(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _count(layers: int, stages: int, ends: Sequence[float]) -> list[int]:
    """Layers of each stage: one after another to the lightest, which is optimal as all layers weigh the same."""
    weight = [0.0] * stages
    weight[0] += ends[0]
    weight[-1] += ends[1]
    count = [0 if stage_weight > 0 and stages > 1 else 1 for stage_weight in weight]
    # the ends give way first: the last (its head is the heavier), then the first
    middle_first = [*range(1, stages - 1), 0, stages - 1] if stages > 1 else [0]
    for _ in range(layers - sum(count)):
        lightest = min(middle_first, key=lambda stage: weight[stage] + count[stage])
        count[lightest] += 1
    return count
