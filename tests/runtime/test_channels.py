"""Messages without tags: a communicator for each direction of a pair, or one for both; gloo stands in for such a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch, plain_step
from ranks import Ranks

from helixpipe.errors import ConfigError
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.hardware import Communicators
from helixpipe.predict.simulate import simulate_program
from helixpipe.runtime import pipeline as pipelines
from helixpipe.runtime.channels import Channels
from helixpipe.runtime.emulated import rehearse
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.transport import Transport
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program

SHAPE = ModelShape(layers=8, hidden=16, heads=2, ffn=32, vocabulary=17, tied=True)


def orders() -> tuple[list[Any], list[Any]]:
    """On a rank: the order in which it makes channels."""
    both = (Channels(dist.group.WORLD, communicators, 20.0) for communicators in ("direction", "pair"))
    given = [(3, 0), (1, 0), (2, 1), (0, 1), (3, 0)]
    return tuple(channels.ways(given) for channels in both)  # type: ignore[return-value]


def test_all_ranks_make_channels_in_one_order(four_ranks: Ranks) -> None:
    assert four_ranks.run(orders) == [([(0, 1), (1, 0), (3, 0), (2, 1)], [(0, 1), (0, 3), (1, 2)])] * 4


def stepped(
    family: str, options: dict[str, Any], communicators: str
) -> tuple[float, dict[str, torch.Tensor], list[Any]]:
    """On a rank: a step over gloo without tags, and which directions have groups of their own."""
    real, made = Transport, []

    def untagged(*args: Any) -> Transport:
        made.append(real(*args, tags=False))
        return made[-1]

    pipelines.Transport = untagged  # type: ignore[assignment, misc]
    try:
        schedule = build_schedule(family, ranks=4, layers=8, microbatches=4, **options)
        pipeline = Pipeline(
            Decoder(SHAPE),
            schedule,
            dtype=torch.float64,
            timeout_s=20,
            communicators=communicators,  # type: ignore[arg-type]
        )
    finally:
        pipelines.Transport = real  # type: ignore[misc]
    data = batch(SHAPE, 4, 12)
    pipeline.step(*data)
    pipeline.zero_gradients()
    loss = pipeline.step(*data)
    pipeline.close()
    channels = made[0]._channels
    groups = [(way, dist.get_process_group_ranks(c.group), c.group.group_name) for way, c in channels._made.items()]
    return loss, {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}, groups


CASES = [
    ("interleaved", {"stages_per_rank": 2}, "direction"),  # a circle
    ("helix", {"travel": "attention"}, "pair"),  # all pairs, weights too
]


@pytest.mark.parametrize(("family", "options", "communicators"), CASES, ids=str)
def test_gradients_are_the_same_without_tags(
    four_ranks: Ranks, family: str, options: dict[str, Any], communicators: str
) -> None:
    loss, gradients = plain_step(SHAPE, *batch(SHAPE, 4, 12))
    program = lower(build_schedule(family, ranks=4, layers=8, microbatches=4, **options), SHAPE, Batch(1, (12,)))
    ways = {(m.src, m.dst) for m in program.messages}
    found: dict[str, torch.Tensor] = {}
    for rank, (mine, theirs, groups) in enumerate(four_ranks.run(stepped, family, options, communicators)):
        assert abs(mine - loss) < 1e-12
        found |= theirs
        assert {way for way, _, _ in groups} >= {way for way in ways if rank in way}
        assert all(members == sorted(way) for way, members, _ in groups)
        pairs = {(min(way), max(way)) for way, _, _ in groups}
        assert len({name for _, _, name in groups}) == (len(groups) if communicators == "direction" else len(pairs))
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


def test_unknown_communicators_are_refused() -> None:
    schedule = build_schedule("1f1b", ranks=1, layers=8, microbatches=1)
    said = r"^runtime\.communicators: 'both' is not known; known: direction, pair$"
    with pytest.raises(ConfigError, match=said):
        Pipeline(Decoder(SHAPE), schedule, communicators="both")  # type: ignore[arg-type]


# what it costs, predicted


def crossing() -> Program:
    """Two stages on each of two ranks: values and gradients go to and fro all the time."""
    schedule = build_schedule("interleaved", ranks=2, layers=8, microbatches=4, stages_per_rank=2)
    return lower(schedule, replace(SHAPE, tied=False), Batch(1, (12,)), lambda action: 1.0)


def test_one_communicator_for_both_directions_makes_messages_take_turns() -> None:
    """Without an action's time a link that takes turns carries one message after another, and two ways carry two at once."""
    program = crossing()

    def makespan_s(action_s: float, message_s: float, communicators: Communicators = "direction") -> float:
        return simulate_program(
            program, lambda action: action_s, lambda message: message_s, communicators=communicators
        ).makespan_s

    assert makespan_s(1.0, 1.0, "pair") > makespan_s(1.0, 1.0)
    assert makespan_s(1.0, 0.0, "pair") == makespan_s(1.0, 0.0)
    assert makespan_s(0.0, 10.0) < 10.0 * len(program.messages) <= makespan_s(0.0, 10.0, "pair")


def test_a_rehearsal_takes_turns_as_its_simulation_does() -> None:
    program = crossing()
    timeline = rehearse(program, lambda action: 0.0, lambda message: 0.01, timeout_s=20, communicators="pair")
    assert timeline.makespan_s >= 0.01 * len(program.messages)
