"""What parts, actions and messages cost, from an accelerator's rates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from helixpipe.errors import ConfigError
from helixpipe.parts.kind import KINDS
from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.cost import Analytic, accelerator_bytes, action_seconds, message_bytes
from helixpipe.predict.hardware import ACCELERATORS, LINKS, Accelerator, Link, named_accelerator, named_link
from helixpipe.predict.memory import peak_activation_bytes
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Kind

SHAPE = ModelShape(layers=2, hidden=8, heads=2, ffn=32, vocabulary=16, mlp="gelu", norm="layer")
BATCH = Batch(3, (10,))
IDEAL = Analytic(SHAPE, named_accelerator("ideal"))
# 100 FLOPs and 10 bytes a second
SLOW = Accelerator("slow", 100.0, 1e9, 10.0, "made up", 0.5, 0.25, 0.2, 1.0, 0.0)


def test_every_accelerator_names_links_that_are_known() -> None:
    own = {name: (each.link, each.tensor_link, each.device) for name, each in ACCELERATORS.items()}
    assert all(link in LINKS and inside in LINKS for link, inside, _ in own.values())
    assert own["ideal"] == ("free", "free", "cuda")
    assert own["laptop-core"] == ("loopback", "loopback", "cpu")
    inside = {name: tensor_link for name, (_, tensor_link, _) in own.items()}
    assert [inside[name] for name in ("a100", "a800", "h100", "b200")] == [
        "nvlink-a100", "nvlink-a800", "nvlink", "nvlink-b200",
    ]  # fmt: skip


def test_float32_has_a_rate_of_its_own() -> None:
    mlp = Part("mlp", 0)
    for name, times in (("h100", 989 / 67), ("a100", 16), ("laptop-core", 1), ("ideal", 1)):
        accelerator = replace(named_accelerator(name), launch_s=0.0, memory_bytes_per_s=float("inf"))
        half, single = (Analytic(SHAPE, accelerator, size) for size in (2, 4))
        assert single.weight_s(mlp, BATCH, 0) == pytest.approx(times * half.weight_s(mlp, BATCH, 0))
        assert single.forward_s(mlp, BATCH, 0) == pytest.approx(times * half.forward_s(mlp, BATCH, 0))


def test_a_precision_without_a_rate_is_refused() -> None:
    told = "float64: {} has no rate for it; measure with helixpipe profile --dtype float64, or use ideal"
    for name in ACCELERATORS.keys() - {"ideal"}:
        with pytest.raises(ConfigError) as caught:
            Analytic(SHAPE, named_accelerator(name), 8)
        assert str(caught.value) == told.format(name)
    wide = Analytic(SHAPE, named_accelerator("ideal"), 8)
    assert wide.weight_s(Part("mlp", 0), BATCH, 0) == IDEAL.weight_s(Part("mlp", 0), BATCH, 0)
    with pytest.raises(ConfigError, match=r"^float32: slow has no rate for it"):
        Analytic(SHAPE, SLOW, 4)


def test_ideal_prices_every_flop_alike() -> None:
    for part in chain(2):
        forward, backward = SHAPE.forward_flops(part, BATCH, 0), SHAPE.backward_flops(part, BATCH, 0)
        assert IDEAL.forward_s(part, BATCH, 0) == pytest.approx(forward / 1e12)
        both = IDEAL.input_s(part, BATCH, 0) + IDEAL.weight_s(part, BATCH, 0)
        assert both == pytest.approx(backward / 1e12)


def test_attention_has_no_weights_and_its_own_efficiency() -> None:
    costs = Analytic(SHAPE, SLOW)
    attention = Part("attn", 0)
    flops = 4 * 3 * 8 * 10 * 10 / 2  # causal: half of the pairs
    assert costs.forward_s(attention, BATCH, 0) == pytest.approx(flops / 25)
    assert costs.input_s(attention, BATCH, 0) == pytest.approx(2.5 * flops / 20)
    assert costs.weight_s(attention, BATCH, 0) == 0


def test_starting_a_part_takes_time_whatever_its_size() -> None:
    started = Analytic(SHAPE, replace(SLOW, launch_s=3.0))
    for part in chain(2):
        assert started.forward_s(part, BATCH, 0) == pytest.approx(Analytic(SHAPE, SLOW).forward_s(part, BATCH, 0) + 3)
    assert started.weight_s(Part("attn", 0), BATCH, 0) == 0  # there is none


def test_bytes_take_time_beside_flops() -> None:
    """A norm has no FLOPs that count: it reads and writes 2h elements a token, twice that backward."""
    costs = Analytic(SHAPE, SLOW, element_bytes=2)
    assert costs.forward_s(Part("norm", 0), BATCH, 0) == pytest.approx(30 * 2 * 8 * 2 / 10)
    assert costs.input_s(Part("norm", 0), BATCH, 0) == pytest.approx(2 * 30 * 2 * 8 * 2 / 10)


def test_grouped_heads_and_swiglu_are_counted() -> None:
    shape = replace(SHAPE, kv_heads=1, mlp="swiglu")
    costs = Analytic(shape, named_accelerator("ideal"))
    assert costs.forward_s(Part("qkv", 0), BATCH, 0) == pytest.approx(2 * 30 * 8 * (8 + 2 * 4) / 1e12)
    assert costs.forward_s(Part("mlp", 0), BATCH, 0) == pytest.approx(2 * 30 * 3 * 8 * 32 / 1e12)


def test_tensor_parallel_divides_the_work_and_pays_for_its_messages() -> None:
    link = Link("wire", 1000.0, 0.5, "made up")
    alone, two = Analytic(SHAPE, SLOW), Analytic(SHAPE, SLOW, tensor_parallel=2)
    joined = Analytic(SHAPE, SLOW, tensor_parallel=2, tensor_link=link)
    # 1 = a gather or a scatter of [b, s, h]: embedding and head pay one where the vocabulary is divided, as Megatron's
    megatron = replace(joined, vocabulary_divided=True)
    expected = {
        "embed": (0, 1),
        "norm": (0, 0),
        "qkv": (1, 1),
        "attn": (0, 0),
        "proj": (1, 1),
        "mlp": (2, 2),
        "block": (4, 4),
        "head": (0, 1),
        "lookup": (0, 1),
        "joined": (0, 0),
        "final": (0, 0),
        "logits": (0, 1),
        "loss": (0, 0),
    }
    assert expected.keys() == KINDS.keys()
    for kind, exchanges in expected.items():
        part = Part(kind, 0)
        for costs, count in zip((joined, megatron), exchanges, strict=True):
            for price in ("forward_s", "input_s"):
                halved = getattr(two, price)(part, BATCH, 0)
                assert halved == pytest.approx(getattr(alone, price)(part, BATCH, 0) / 2)
                paid = getattr(costs, price)(part, BATCH, 0) - halved
                assert paid == pytest.approx(count * (0.5 + 30 * 8 * 2 / 2 / 1000)), (kind, price)


def seconds_of(schedule: object, recompute: str, **chunks: int) -> object:
    return action_seconds(schedule, SHAPE, BATCH, IDEAL, Keeping(recompute, 4, **chunks))  # type: ignore[arg-type]


def test_an_action_costs_what_its_parts_do() -> None:
    schedule = build_schedule("1f1b", ranks=1, layers=2, microbatches=1)
    of = seconds_of(schedule, "none")
    forward = sum(IDEAL.forward_s(part, BATCH, 0) for part in chain(2))
    inputs = sum(IDEAL.input_s(part, BATCH, 0) for part in chain(2))
    weights = sum(IDEAL.weight_s(part, BATCH, 0) for part in chain(2))
    attention = 2 * IDEAL.forward_s(Part("attn", 0), BATCH, 0)
    assert of(Action(0, Pass.F, 0)) == pytest.approx(forward)
    assert of(Action(0, Pass.I, 0)) == pytest.approx(inputs)
    assert of(Action(0, Pass.W, 0)) == pytest.approx(weights)
    assert of(Action(0, Pass.B, 0)) == pytest.approx(inputs + weights)
    assert seconds_of(schedule, "full")(Action(0, Pass.B, 0)) == pytest.approx(inputs + weights + forward)
    selective = seconds_of(schedule, "selective")
    assert selective(Action(0, Pass.B, 0)) == pytest.approx(inputs + weights + forward - attention)
    assert selective(Action(0, Pass.I, 0)) == pytest.approx(inputs + forward - attention)


def test_a_chunked_part_runs_forward_once_more_and_its_weights_do_not_wait() -> None:
    schedule = build_schedule("1f1b", ranks=1, layers=2, microbatches=1)
    whole, sliced = seconds_of(schedule, "none"), seconds_of(schedule, "none", mlp_chunk=4)
    mlp = Part("mlp", 0)
    more = 2 * (IDEAL.forward_s(mlp, BATCH, 0) + IDEAL.weight_s(mlp, BATCH, 0))
    assert sliced(Action(0, Pass.I, 0)) == pytest.approx(whole(Action(0, Pass.I, 0)) + more)
    less = 2 * IDEAL.weight_s(mlp, BATCH, 0)
    assert sliced(Action(0, Pass.W, 0)) == pytest.approx(whole(Action(0, Pass.W, 0)) - less)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_chunk_that_the_segment_is_not_longer_than_does_nothing(recompute: str) -> None:
    schedule = build_schedule("1f1b", ranks=1, layers=2, microbatches=1)
    whole, same = seconds_of(schedule, recompute), seconds_of(schedule, recompute, mlp_chunk=10, head_chunk=11)
    for kind in (Pass.F, Pass.B, Pass.I, Pass.W):
        assert same(Action(0, kind, 0)) == whole(Action(0, kind, 0))
    program = lower(schedule, SHAPE, BATCH)
    kept = [peak_activation_bytes(program, Keeping(recompute, 4, chunk, chunk)) for chunk in (0, 2, 10)]
    assert kept[0] == kept[2]
    assert kept[1] < kept[0]


def test_a_message_is_its_elements_in_the_precision_that_it_travels_in() -> None:
    program = lower(build_schedule("helix", ranks=2, layers=2, microbatches=2, travel="qkv"), SHAPE, BATCH)
    for message in program.messages:
        size = 4 if message.kind is Kind.WEIGHT_GRADIENTS else 2  # gradients of weights are float32
        assert message_bytes(message, Keeping("none", 2)) == size * message.elements


def test_an_accelerator_sends_its_share_of_values_and_what_it_holds_of_parameters() -> None:
    """tp 2 of 4: matrices are halved, a tied table and norms travel whole; context parallelism divides values alone."""
    shape = replace(SHAPE, tied=True)
    program = lower(build_schedule("helix", ranks=2, layers=2, microbatches=2, travel="attention"), shape, BATCH)
    sizes = accelerator_bytes(program, Keeping("none", 2), shape.tensor_share(2), group=4)
    wholes = 0
    for message, size in zip(program.messages, sizes, strict=True):
        width = 4 if message.kind is Kind.WEIGHT_GRADIENTS else 2
        if message.kind in (Kind.VALUES, Kind.GRADIENTS):
            assert size == math.ceil(message.elements * width / 4)
            continue
        halves = {n: math.prod(s) for n, s in zip(message.names, message.shapes, strict=True)}
        whole = {name for name in halves if ".norm." in name or name == "embed.tokens.weight"}
        wholes += len(whole)
        assert size == width * sum(size if name in whole else size // 2 for name, size in halves.items())
    assert wholes


def test_everything_known_has_a_source_and_sane_rates() -> None:
    assert {"ideal", "laptop-core", "h20", "a100", "a800", "h100", "h200", "b200"} == set(ACCELERATORS)
    for accelerator in ACCELERATORS.values():
        assert len(accelerator.source) > 20
        for name in ("matmul", "attention", "attention_backward", "memory"):
            assert 0 < getattr(accelerator, f"{name}_efficiency") <= 1
    assert {"free", "loopback", "ethernet", "infiniband", "nvlink"} <= set(LINKS)
    assert all(link.source and link.seconds(1e9) >= 0 for link in LINKS.values())
    assert named_link("free").seconds(1e12) == 0


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^hardware: 'h10' is not known; did you mean 'h100'\?$"):
        named_accelerator("h10")
    with pytest.raises(ConfigError, match=r"^link: 'infinband' is not known; did you mean 'infiniband'\?$"):
        named_link("infinband")
