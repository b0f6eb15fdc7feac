"""hp.Layers described: names, sizes, what is alike; what schedules, simulations and plans make of it; what is refused."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import helixpipe as hp
from helixpipe.model.layers_shape import LayersShape
from helixpipe.parts.part import chain
from helixpipe.parts.work import Work
from helixpipe.schedule.families import FAMILIES

WORDS, H = 11, 8
AT_X = (
    "gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v", "constructed",
)  # fmt: skip


class Wide(nn.Module):
    """An MLP with a residual: `times` as wide inside."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, times * H), nn.Linear(times * H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class OwnLoss(nn.Module):
    """The head that gives the loss itself."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.linear, self.reduction = nn.Linear(H, WORDS), reduction

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x).flatten(0, 1), targets.flatten(), reduction=self.reduction)


class MayTakeTargets(nn.Module):
    """What it does with x alone counts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, WORDS)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.linear(x)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Learned(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WORDS))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.scale, targets, reduction="sum")


def model(times: Sequence[int] = (2, 2, 3, 2), **more: Any) -> hp.Layers:
    return hp.Layers(nn.Embedding(WORDS, H), [Wide(each) for each in times], nn.Linear(H, WORDS), **more)


def refused(embed: Any = None, layers: Any = None, head: Any = None, **more: Any) -> str:
    with pytest.raises(hp.ConfigError) as error:
        hp.Layers(embed or nn.Embedding(WORDS, H), layers or [Wide(2)], head or nn.Linear(H, WORDS), **more)
    return str(error.value)


def test_every_parameter_has_the_name_of_its_module() -> None:
    found = model((2,))
    shape, parts = found.shape, chain(1, (0,))
    assert shape.chain() == parts
    assert shape.parameter_elements(parts) == {
        "embed.weight": WORDS * H,
        "layers.0.up.weight": 2 * H * H, "layers.0.up.bias": 2 * H, "layers.0.down.weight": 2 * H * H, "layers.0.down.bias": H,
        "head.weight": WORDS * H, "head.bias": WORDS,
    }  # fmt: skip
    assert shape.parameter_count == 2 * WORDS * H + WORDS + 4 * H * H + 3 * H
    for part in parts:
        named = {shape.parameter_name(part, name) for name, _ in found.part(part).named_parameters()}
        assert named == shape.parameter_elements([part]).keys()
    assert (shape.layers, shape.hidden, shape.opaque) == (1, H, (0,))


def test_parts_are_copies() -> None:
    embed = nn.Embedding(WORDS, H)
    part = hp.Layers(embed, [Wide(2)], nn.Linear(H, WORDS)).part(hp.Part("embed", 0))
    with torch.no_grad():
        next(part.parameters()).zero_()
    assert embed.weight.abs().sum() > 0


def test_a_parameter_in_two_places_is_one() -> None:
    embed, head, layer = nn.Embedding(WORDS, H), nn.Linear(H, WORDS, bias=False), Wide(2)
    head.weight = embed.weight
    shape = hp.Layers(embed, [layer, layer], head).shape
    assert shape.parameter_count == WORDS * H + 4 * H * H + 3 * H
    assert {name.split(".")[0] for name in shape.parameter_elements(shape.chain())} == {"embed", "layers"}
    assert "layers.1.up.weight" not in shape.parameter_elements(shape.chain())


def test_layers_of_one_class_and_size_are_alike() -> None:
    shape = model((2, 2, 3, 2)).shape
    likes = [shape.alike(part) for part in shape.chain()]
    assert [likes.index(like) for like in likes] == [0, 1, 1, 3, 1, 5]
    work = Work(shape, hp.Batch(2, (32,)))
    assert [shape.about(part).forward_flops(part, work) for part in shape.chain()] == [
        0, *(2 * 2 * 64 * times * H * H for times in (2, 2, 3, 2)), 2 * 64 * H * WORDS,
    ]  # fmt: skip
    stateful = [nn.Dropout(p) for p in (0.1, 0.2, 0.1)]
    shape = hp.Layers(nn.Embedding(WORDS, H), stateful, nn.Linear(H, WORDS)).shape
    likes = [shape.alike(part) for part in shape.chain()]
    assert likes[1] == likes[3] != likes[2]


def test_x_has_the_shape_that_modules_give_it() -> None:
    layers = [nn.Unflatten(-1, (2, H // 2)), nn.Flatten(2), nn.Linear(H, 3)]
    shape = hp.Layers(nn.Embedding(WORDS, H), layers, nn.Linear(3, WORDS)).shape
    batch = hp.Batch(2, (5,))
    shapes = [shape.value_shape(hp.Value("x", layer), batch, 0) for layer in range(4)]
    assert shapes == [(2, 5, H), (2, 5, 2, H // 2), (2, 5, H), (2, 5, 3)]
    assert shape.value_shape(hp.Value("loss", 3), batch, 0) == ()


def test_what_a_part_saves_is_named_by_its_values() -> None:
    shape = model((2, 2)).shape
    work = Work(shape, hp.Batch(2, (16,)))
    embed, first, _, head = shape.chain()
    x = 2 * 16 * H * 4
    assert work.saved(embed) == {}
    assert work.saved(first) == {"x.0": x, "block.0.inside": 2 * x}  # tanh's output is what `down` reads
    assert work.saved(head)["x.2"] == x
    assert work.kept(first) == work.put_off(first) == {}


def test_it_is_pickled_without_its_trials() -> None:
    shape = model((2,)).shape
    again = pickle.loads(pickle.dumps(shape))
    assert isinstance(again, LayersShape)
    assert again.parameter_elements(again.chain()) == shape.parameter_elements(shape.chain())
    part, work = shape.chain()[1], Work(again, hp.Batch(1, (8,)))
    assert again.about(part).forward_flops(part, work) == 2 * 2 * 8 * 2 * H * H


@pytest.mark.parametrize("family", AT_X)
def test_a_schedule_is_made_for_it_and_simulated(family: str) -> None:
    found = model()
    schedule = hp.build_schedule(family, ranks=2, model=found, microbatches=4)
    assert {part.kind for stage in schedule.stages for part in stage.parts} == {"embed", "block", "head"}
    timeline = hp.simulate(schedule, found, "h100", sequence_length=4096)
    assert timeline.makespan_s > 0
    assert min(timeline.peak_bytes) > 0
    one = hp.simulate(
        hp.build_schedule("1f1b", ranks=1, model=found, microbatches=4), found, "h100", sequence_length=4096
    )
    assert max(timeline.busy_s) < one.makespan_s


def test_families_that_look_inside_layers_are_refused_by_name() -> None:
    found = model()
    refusals = {}
    for family in set(FAMILIES) - set(AT_X):
        with pytest.raises(hp.ConfigError) as error:
            hp.build_schedule(family, ranks=2, model=found, microbatches=4)
        refusals[family] = str(error.value)
    assert refusals.pop("helix") == (
        "schedule.family: helix looks inside layers, and layer 0 is one opaque block; use gpipe, 1f1b, interleaved, "
        "breadth_first, zb_h1, zb_h2, zb_v, v_half, v_min or dualpipe_v"
    )
    for told in refusals.values():
        assert told.endswith(
            "segments need layers that hand on keys and values, and layer 0 is one opaque block; use segments = 1"
        )
    assert len(hp.build_schedule("seq1f1b", ranks=2, model=found, microbatches=4, segments=1).stages) == 2
    by_hand = hp.build_schedule("1f1b", ranks=2, layers=4, microbatches=4, opaque=True)
    assert by_hand == hp.build_schedule("1f1b", ranks=2, model=found, microbatches=4)
    with pytest.raises(hp.ConfigError, match=r"^schedule.layers: 3, and the model has 4; leave layers away$"):
        hp.build_schedule("1f1b", ranks=2, model=found, layers=3, microbatches=4)


def test_a_schedule_that_was_not_made_for_it_is_refused() -> None:
    schedule = hp.build_schedule("1f1b", ranks=1, layers=4, microbatches=2)
    told = (
        r"^norm\.0: a model of hp\.Layers has no such part, since its layers are one block each; make its schedule with "
        r"hp\.build_schedule\(\.\.\., model=model\)$"
    )
    with pytest.raises(hp.ConfigError, match=told):
        hp.simulate(schedule, model())
    with pytest.raises(hp.ConfigError, match=told):
        hp.Pipeline(model(), schedule)


def test_a_plan_takes_it_and_says_which_families_cannot() -> None:
    setting = hp.Setting(model((2, 2, 3, 2, 2, 2, 2, 2)).shape, 8192)
    plan = hp.plan(setting, 2, 4, 1e9)
    pipelines = {choice.candidate.family for choice in plan.fits if choice.is_pipeline}
    untried = {"constructed"}  # where nobody asks for it
    assert pipelines == set(AT_X) - untried
    assert not any(choice.candidate.chunk for choice in plan.fits), "nothing of it runs in slices"
    assert {name.split(",")[0] for name in plan.refused} == set(FAMILIES) - set(AT_X) - untried
    assert {choice.candidate.family for choice in plan.fits} - pipelines == {"fsdp"}
    assert plan.best.ideal_s <= plan.best.makespan_s


def test_stages_are_balanced_by_what_layers_cost() -> None:
    """A head of as much work as three layers is a stage by itself."""
    found = hp.Layers(nn.Embedding(WORDS, H), [nn.Linear(H, H) for _ in range(3)], nn.Linear(H, 4 * H))
    schedule = hp.Setting(found.shape, 64).build("1f1b", 2, 4)
    assert [len(stage.parts) for stage in schedule.stages] == [4, 1]
    idle = hp.Layers(nn.Embedding(WORDS, H), [nn.Identity(), nn.Identity()], nn.Linear(H, WORDS))
    assert [len(stage.parts) for stage in hp.Setting(idle.shape, 64).build("zb_v", 1, 4).stages] == [2, 2]


def test_ranks_cannot_share_its_sequences_or_matrices() -> None:
    for axis, name in (("context_parallel", "cp"), ("tensor_parallel", "tp")):
        with pytest.raises(hp.ConfigError) as error:
            hp.Setting(model().shape, 64, **{axis: 2})
        assert str(error.value) == (
            f"mesh.{name}: 2; the modules of hp.Layers cannot be shared by ranks: use {name} 1, and dp in its place"
        )


def test_a_profile_of_a_decoder_does_not_price_it() -> None:
    class Measured:
        shape = hp.named_shape("tiny")

    with pytest.raises(
        hp.ConfigError, match=r"^profile: measured of a decoder's parts, and this model's layers are its own"
    ):
        _ = hp.Setting(model().shape, 64, profile=Measured()).costs  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"head": OwnLoss()},
        {"head": MayTakeTargets()},
        {"loss": nn.CrossEntropyLoss(reduction="sum")},
        {"loss": functools.partial(F.cross_entropy, reduction="sum", label_smoothing=0.1)},
        {"loss": Learned()},
    ],
    ids=["logits", "own_loss", "may_take_targets", "module", "partial", "learned"],
)
def test_losses_that_are_sums(more: dict[str, Any]) -> None:
    found = hp.Layers(nn.Embedding(WORDS, H), [Wide(2)], **({"head": nn.Linear(H, WORDS)} | more))
    head = found.shape.chain()[-1]
    assert found.shape.figures(head, Work(found.shape, hp.Batch(1, (8,)))).made == ()
    assert ("head.loss.scale" in found.shape.parameter_elements([head])) == isinstance(more.get("loss"), Learned)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"loss": F.cross_entropy}, "loss (cross_entropy)"),
        ({"loss": nn.CrossEntropyLoss()}, "loss (CrossEntropyLoss)"),
        ({"head": OwnLoss("mean")}, "head (OwnLoss)"),
    ],
)
def test_a_mean_is_refused_before_it_trains_wrong(more: dict[str, Any], name: str) -> None:
    told = refused(**more)
    assert told.startswith(f"{name} is no sum over tokens: it gives ")
    assert told.endswith(
        "of both together; a pipeline divides by the counted targets of the whole batch itself: give the sum (reduction='sum')"
    )


def test_what_is_no_model_is_refused() -> None:
    with torch.device("meta"):
        nowhere = nn.Linear(H, H)
    clash = nn.Linear(H, WORDS)
    clash.loss = Learned()
    assert refused(embed="words") == "embed: str is no torch.nn.Module; give one"
    assert refused(layers=[Wide(2), F.gelu]).startswith("layers.1: ")
    assert refused(layers=[nowhere]) == "layers.0: Linear is on the meta device and has no values; make it on the CPU"
    with pytest.raises(hp.ConfigError, match=r"^layers: there is none; give at least one$"):
        hp.Layers(nn.Embedding(WORDS, H), [], nn.Linear(H, WORDS))
    assert refused(layers=[nn.LSTM(H, H)]) == (
        "layers.0 (LSTM) gave tuple of 2; give one tensor of floats: wrap it in a module that returns that alone"
    )
    assert refused(layers=[Wide(2), nn.Linear(H + 1, H)]).startswith(
        "layers.1 (Linear) failed on [1, 16, 8] in float32: "
    )
    assert refused(head=OwnLoss("none")).startswith(
        "head (OwnLoss) gave [16] as the loss; give a scalar, the sum over tokens"
    )
    assert refused(head=OwnLoss(), loss=F.cross_entropy) == (
        "head: OwnLoss.forward requires targets, so that it gives the loss; leave `loss` away, or let it take x alone and give "
        "logits"
    )
    assert refused(head=Mean()) == (
        "head (Mean) gave logits [1, 8] for targets [1, 16]; give [b, s, classes], or let its forward require (x, targets) and "
        "give the loss"
    )
    assert (
        refused(head=clash, loss=Learned())
        == "head.loss.scale: two parameters have this name; rename one in its module"
    )


def test_the_first_trial_is_as_long_as_asked() -> None:
    class Paired(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, 12)).flatten(1, 2)

    assert "layers.0 (Paired) failed on [1, 16, 8]" in refused(layers=[Paired()])
    found = hp.Layers(nn.Embedding(WORDS, H), [Paired()], nn.Linear(H, WORDS), length=24)
    assert found.shape.example() == hp.Batch(1, (24,))


def test_digests_tell_values_apart() -> None:
    torch.manual_seed(0)
    one = model((2, 2))
    torch.manual_seed(0)
    two = model((2, 2))
    assert one.digests() == two.digests()
    assert list(one.digests()) == ["embed", "block.0", "block.1", "head.2"]
    with torch.no_grad():
        two._pieces[1].module.up.bias[0] += 1e-3  # type: ignore[union-attr,index,operator]
    told = [name for name in one.digests() if one.digests()[name] != two.digests()[name]]
    assert told == ["block.0"]
