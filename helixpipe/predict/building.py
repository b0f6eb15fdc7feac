"""What orders are built from: of a setting, what each action takes, what each forward keeps, what layers cost.

    Setting ──► prices, kept, layer costs ──► build_schedule(...) ──► an order

Costs are those that families balance by: FLOPs where nothing was measured, whatever the accelerator, since training, which is
told of none, builds the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from helixpipe.parts.kind import Kept
from helixpipe.parts.part import Part, layer_parts
from helixpipe.parts.work import Batch, Work
from helixpipe.predict.cost import PartCosts, action_seconds
from helixpipe.predict.keeping import kept, key_values
from helixpipe.schedule import families
from helixpipe.schedule.action import Action
from helixpipe.schedule.chunks import chunks
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from helixpipe.predict.estimate import Setting


def decided_by(setting: Setting, family: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a setting a family's schedule follows from: settings of one model that agree in it build the same schedule."""
    names = families.options(family)
    balance = tuple((name, value) for name, value in setting.balance.items() if name in names)
    cut = setting.layer_costs
    if family != "constructed" and options.get("vocabulary") != "spread":
        return balance, cut
    segments = setting.segment_lengths(options.get("segments", 1))  # the order too, by what actions cost and keep
    return balance, cut, setting.keeping, setting.microbatch_size, segments


def prices(
    setting: Setting, costs: PartCosts, batches: Sequence[Batch], schedule: Schedule
) -> Callable[[Action], float]:
    """What a schedule's actions take; of these micro-batches, or where there are none of the setting's."""
    each = batches or setting.batch(schedule.segments)
    return action_seconds(schedule, setting.shape, each, costs, setting.keeping)


def kept_bytes(setting: Setting, schedule: Schedule) -> tuple[Callable[[Action], float], Callable[[Action], float]]:
    """What a forward keeps on one accelerator until its backward, and what an I leaves of that for its W."""
    batch, keeping = setting.batch(schedule.segments), setting.keeping

    @cache
    def of(stage: int, segment: int) -> tuple[float, float]:
        work = Work(setting.shape, batch, segment, keeping)
        found: Kept = {}
        late: Kept = {}
        for chunk in chunks(schedule.stages[stage], not keeping.recomputes, schedule.outputs[stage]):
            found |= kept(chunk, work)
            for part in chunk.parts:
                late |= work.put_off(part)
                found |= key_values(part, chunk, work) if schedule.segments > 1 else {}
        return sum(found.values()) / setting.group, sum(late.values()) / setting.group

    def keeps(forward: Action) -> float:
        return of(forward.stage, forward.segment)[0]

    def puts_off(forward: Action) -> float:
        return of(forward.stage, forward.segment)[1]

    return keeps, puts_off


def layer_costs(setting: Setting, costs: PartCosts) -> tuple[float, ...]:
    """What each layer's forward and backward cost, in those of the mean layer; none where all are alike.

    Rounded, as `Setting.balance` is, so that plan, simulate and training cut the same stages.
    """
    shape, names = setting.shape, ("forward_s", "input_s", "weight_s")
    of_layers = [layer_parts(layer, layer in shape.opaque) for layer in range(shape.layers)]
    if len({tuple(map(shape.alike, parts)) for parts in of_layers}) == 1:
        return ()

    def cost(part: Part) -> float:
        again = costs.forward_s(part, setting.whole, 0) if setting.keeping.runs_again(part) else 0.0
        return again + math.fsum(getattr(costs, name)(part, setting.whole, 0) for name in names)

    found = [math.fsum(map(cost, parts)) for parts in of_layers]
    mean = math.fsum(found) / len(found)
    rounded = tuple(float(f"{each / mean:.3g}") for each in found) if mean else ()
    return rounded if len(set(rounded)) > 1 else ()
